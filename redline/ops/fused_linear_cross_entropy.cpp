#include "redline/ops/fused_linear_cross_entropy.h"

#include "redline/ops/fused_linear_cross_entropy_chunks.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* op_name = "fused_linear_cross_entropy";

// What the public op is given beside the products' operands.
using Options = FusedLinearCrossEntropyOptions;

void check_head(const LossHead& head, const Options& options) {
  const auto& [x, weight, bias, targets, loss] = head;
  check_weight({.op = op_name}, x, x.scalar_type(), weight, bias);
  TORCH_CHECK(x.sym_size(-1) == weight.sym_size(1), op_name, ": x: expected a last dimension of ",
              weight.sym_size(1), ", not ", x.sym_size(-1));
  TORCH_CHECK(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt, op_name,
              ": targets: expected classes as int64 or int32, not ", targets.scalar_type());
  const auto rows = x.sym_sizes().slice(0, x.dim() - 1);
  TORCH_CHECK(targets.sym_sizes() == rows, op_name, ": targets: expected ", rows, ", not ",
              targets.sym_sizes());
  check_devices(op_name, x, {{"targets", targets}});
  check_options(op_name, loss);
  check_weight_gradient({.op = op_name}, weight, options.weight_gradient);
  check_loss_scale(op_name, targets, loss);
}

// --- derivative ---------------------------------------------------------------------------------

struct FusedLinearCrossEntropyFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& targets, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const LossHead head = {x, weight, bias, targets, options.loss};
    save_weight_gradient(ctx, "weight", options.weight_gradient);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["dtype"] = weight.scalar_type();
    ctx->saved_data["promised"] = options.loss.loss_scale.has_value();
    if (!options.loss.loss_scale) {
      const HeadLoss out = head_loss(head);
      save_options(ctx, options.loss);
      ctx->save_for_backward({x, weight, value(bias), targets, out.statistics, out.count});
      return out.loss;
    }
    const auto wants = [](const Tensor& tensor) {
      return tensor.defined() && tensor.requires_grad();
    };
    const auto [loss, kept] =
        promised_gradients(head, {wants(x), wants(weight), wants(value(bias))},
                           options.weight_gradient.main_grad.has_value());
    ctx->save_for_backward({kept.x, kept.weight, kept.bias, *options.loss.loss_scale});
    return loss;
  }

  static HeadGradients promised(AutogradContext* ctx, const Tensor& loss_grad,
                                WantedGradients wanted, const WeightGradientOptions& weight) {
    TORCH_CHECK(!at::GradMode::is_enabled(), op_name,
                ": loss_scale: expected a backward without create_graph");
    const variable_list saved = ctx->get_saved_variables();
    const auto dtype = ctx->saved_data["dtype"].toScalarType();
    const auto gradient = [&](int i, const MainGrad& main_grad) {
      return wanted[i] ? fulfilled_gradient(saved[i], loss_grad, saved[3], dtype, main_grad)
                       : Tensor();
    };
    HeadGradients out = {.x = gradient(0, {}), .weight = {}, .bias = gradient(2, {})};
    out.weight = gradient(1, {weight.main_grad, weight.accumulate});  // last: docs/memory.md
    return out;
  }

  static HeadGradients recomputed(AutogradContext* ctx, const Tensor& loss_grad,
                                  WantedGradients wanted, const WeightGradientOptions& weight) {
    const variable_list saved = ctx->get_saved_variables();
    const LossHead head = {saved[0], saved[1], optional(saved[2]), saved[3], saved_options(ctx)};
    return head_gradients(head, {{}, saved[4], saved[5]}, loss_grad, wanted,
                          {weight.main_grad, weight.accumulate});
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const WantedGradients wanted = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1),
        ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)};
    const WeightGradientOptions weight = saved_weight_gradient(ctx, "weight");
    const bool has_buffer = wanted[1] && weight.main_grad;
    Tensor dummy;  // before main_grad is written
    if (has_buffer) {
      dummy =
          dummy_of(*weight.main_grad, ctx->saved_data["dtype"].toScalarType(), weight.dummy_grad);
    }
    HeadGradients out = ctx->saved_data["promised"].toBool()
                            ? promised(ctx, grads[0], wanted, weight)
                            : recomputed(ctx, grads[0], wanted, weight);
    if (has_buffer) out.weight = dummy;
    const auto given = [&](int i, const Tensor& grad) { return wanted[i] ? grad : Tensor(); };
    return {given(0, out.x), given(1, out.weight), given(2, out.bias), Tensor(), Tensor()};
  }
};

Tensor without_derivative(const LossHead& head, const Options& options) {
  check_head(head, options);
  return head_loss(head).loss;
}

Tensor differentiable(const LossHead& head, const Options& options) {
  const bool trained = head.x.requires_grad() || head.weight.requires_grad() ||
                       (head.bias && head.bias->requires_grad());
  if (!trained || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return without_derivative(head, options);
  }
  check_head(head, options);
  return StrictNode<FusedLinearCrossEntropyFunction>::apply(head.x, head.weight, head.bias,
                                                            head.targets, options);
}

// --- the schema's form --------------------------------------------------------------------------

template <Tensor (*Run)(const LossHead&, const Options&)>
Tensor from_schema(const Tensor& x, const Tensor& weight, const Tensor& targets,
                   const OptionalTensor& bias, std::string_view reduction, int64_t ignore_index,
                   double label_smoothing, double z_loss, std::optional<double> logit_softcap,
                   const OptionalTensor& loss_scale, const OptionalTensor& main_grad,
                   bool accumulate, std::string dummy_grad,
                   const std::optional<std::string>& tp_group, bool sequence_parallel) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  const Options options = {.loss = {.reduction = std::string(reduction),
                                    .ignore_index = ignore_index,
                                    .label_smoothing = label_smoothing,
                                    .z_loss = z_loss,
                                    .logit_softcap = logit_softcap,
                                    .loss_scale = loss_scale},
                           .weight_gradient = {main_grad, accumulate, std::move(dummy_grad)}};
  return Run({x, weight, bias, targets, options.loss}, options);
}

template <Tensor (*Run)(const LossHead&, const Options&)>
void implement(torch::Library& m) {
  m.impl(op_name, from_schema<Run>);
}

// As of the stock product: x, weight and bias in autocast's dtype.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor autocast(const LossHead& head, const Options& options) {
  const c10::impl::ExcludeDispatchKeyGuard off(key);
  const auto cast = [](const Tensor& tensor) { return cast_for_product(tensor, device); };
  return fused_linear_cross_entropy(cast(head.x), cast(head.weight), head.targets,
                                    head.bias ? OptionalTensor(cast(*head.bias)) : std::nullopt,
                                    options);
}

}  // namespace

// --- public -------------------------------------------------------------------------------------

Tensor fused_linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                  const OptionalTensor& bias, const Options& options) {
  static const auto op =
      find_op<decltype(from_schema<differentiable>)>("redline::fused_linear_cross_entropy");
  const CrossEntropyOptions& loss = options.loss;
  const WeightGradientOptions& gradient = options.weight_gradient;
  TORCH_CHECK(!gradient.delayed, op_name,
              ": delayed: expected none, for a queue would keep the logits' gradient");
  return op.call(x, weight, targets, bias, loss.reduction, loss.ignore_index, loss.label_smoothing,
                 loss.z_loss, loss.logit_softcap, loss.loss_scale, gradient.main_grad,
                 gradient.accumulate, gradient.dummy_grad, std::nullopt, false);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "fused_linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, Tensor? bias=None, "
      "str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, "
      "float z_loss=0.0, float? logit_softcap=None, *, Tensor? loss_scale=None, "
      "Tensor? main_grad=None, bool accumulate=True, str dummy_grad=\"none\", "
      "str? tp_group=None, bool sequence_parallel=False) -> Tensor");
}

const Registration registration({
    .public_ops = {op_name},
    .without_derivative = implement<without_derivative>,
    .differentiable = implement<differentiable>,
    .autocast_cpu = implement<autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>,
    .autocast_cuda = implement<autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>,
});

}  // namespace redline::ops
