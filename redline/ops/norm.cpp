#include "redline/ops/norm.h"

#include "redline/ops/below_autograd.h"
#include "redline/ops/norm_inner.h"
#include "redline/ops/philox.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- derivative ---------------------------------------------------------------------------------

variable_list results_of(const NormOutputs& out, const NormInputs& in) {
  variable_list results = {out.y};
  if (in.residual) results.push_back(out.sum);
  if (in.wants_amax) results.push_back(out.amax);
  return results;
}

struct NormFunction {
  // Returns {y}, or {y, sum} when there is a residual, and amax behind them where it is wanted.
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& input_bias,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& row_count, const NormInputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const NormOutputs out = norm_forward(x, in);
    ctx->save_for_backward({residual ? out.sum : x, value(weight), value(bias), out.mean,
                            out.inverse_std, value(row_count), value(input_bias), out.rng_state});
    ctx->saved_data["layer"] = in.norm == Norm::layer;
    ctx->saved_data["zero_centered"] = in.zero_centered;
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["has_residual"] = residual.has_value();
    if (out.rng_state.defined()) ctx->saved_data["dropout"] = in.dropout;
    ctx->set_materialize_grads(false);
    if (in.wants_amax) ctx->mark_non_differentiable({out.amax});
    return results_of(out, in);
  }

  // Inputs of forward in order: x, residual, input_bias, weight, bias, row_count, in. The graph has
  // edges for the tensors that were given.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const Tensor &weight = saved[1], &bias = saved[2], &input_bias = saved[6];
    const bool has_residual = ctx->saved_data["has_residual"].toBool();
    const auto x_dtype = ctx->saved_data["x_dtype"].toScalarType();
    int64_t edge = has_residual ? 2 : 1;
    const bool needs_input_bias = input_bias.defined() && ctx->needs_input_grad(edge);
    edge += input_bias.defined();
    const bool needs_weight = weight.defined() && ctx->needs_input_grad(edge);
    edge += weight.defined();
    const bool needs_bias = bias.defined() && ctx->needs_input_grad(edge);
    const Tensor sum_grad = has_residual ? grads[1] : Tensor();
    if (!grads[0].defined() && !sum_grad.defined()) return variable_list(7);
    const NormBackwardInputs in = {
        .norm = ctx->saved_data["layer"].toBool() ? Norm::layer : Norm::rms,
        .mean = saved[3],
        .inverse_std = saved[4],
        .weight = optional(weight),
        .bias = optional(bias),
        .sum_grad = optional(sum_grad),
        .row_count = optional(saved[5]),
        .zero_centered = ctx->saved_data["zero_centered"].toBool(),
        .needs_weight = needs_weight && grads[0].defined(),
        .needs_bias = needs_bias && grads[0].defined(),
        .rng_state = saved[7],
        .input_bias = optional(input_bias),
        .dropout = saved[7].defined() ? ctx->saved_data["dropout"].toDouble() : 0,
        .input_dtype = x_dtype,
        .needs_input_bias = needs_input_bias};
    const NormGradients out =
        grads[0].defined() ? norm_backward(grads[0], saved[0], in) : sum_backward(sum_grad, in);
    return {out.input.defined() ? out.input : out.x.to(x_dtype),
            has_residual ? out.x : Tensor(),
            needs_input_bias ? out.input_bias : Tensor(),
            in.needs_weight ? out.weight : Tensor(),
            in.needs_bias ? out.bias : Tensor(),
            Tensor(),
            Tensor()};
  }
};

void check_given(const Tensor& x, const NormInputs& in) {
  TORCH_CHECK(x.defined(), name(in.norm), ": x: expected a tensor, not None");
}

variable_list differentiable(const Tensor& x, const NormInputs& in) {
  check_given(x, in);
  return StrictNode<NormFunction>::apply(x, in.residual, in.input_bias, in.weight, in.bias,
                                         in.row_count, in);
}

}  // namespace

// --- public ops ---------------------------------------------------------------------------------

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double epsilon, bool zero_centered,
                const OptionalTensor& row_count) {
  static const auto op = find_op<decltype(rms_norm)>("redline::rms_norm");
  return op.call(x, weight, epsilon, zero_centered, row_count);
}

Tensor layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  double epsilon, bool zero_centered, const OptionalTensor& row_count) {
  static const auto op = find_op<decltype(layer_norm)>("redline::layer_norm");
  return op.call(x, weight, bias, epsilon, zero_centered, row_count);
}

std::tuple<Tensor, Tensor> residual_rms_norm(const Tensor& x, const Tensor& residual,
                                             const OptionalTensor& weight, double epsilon,
                                             bool zero_centered, const OptionalTensor& row_count) {
  static const auto op = find_op<decltype(residual_rms_norm)>("redline::residual_rms_norm");
  return op.call(x, residual, weight, epsilon, zero_centered, row_count);
}

std::tuple<Tensor, Tensor> residual_layer_norm(const Tensor& x, const Tensor& residual,
                                               const OptionalTensor& weight,
                                               const OptionalTensor& bias, double epsilon,
                                               bool zero_centered,
                                               const OptionalTensor& row_count) {
  static const auto op = find_op<decltype(residual_layer_norm)>("redline::residual_layer_norm");
  return op.call(x, residual, weight, bias, epsilon, zero_centered, row_count);
}

std::tuple<Tensor, Tensor> bias_dropout_residual_rms_norm(
    const Tensor& x, const OptionalTensor& input_bias, const Tensor& residual, double probability,
    const OptionalTensor& weight, double epsilon, bool zero_centered, bool training) {
  static const auto op =
      find_op<decltype(bias_dropout_residual_rms_norm)>("redline::bias_dropout_residual_rms_norm");
  return op.call(x, input_bias, residual, probability, weight, epsilon, zero_centered, training);
}

std::tuple<Tensor, Tensor> bias_dropout_residual_layer_norm(
    const Tensor& x, const OptionalTensor& input_bias, const Tensor& residual, double probability,
    const OptionalTensor& weight, const OptionalTensor& bias, double epsilon, bool zero_centered,
    bool training) {
  static const auto op = find_op<decltype(bias_dropout_residual_layer_norm)>(
      "redline::bias_dropout_residual_layer_norm");
  return op.call(x, input_bias, residual, probability, weight, bias, epsilon, zero_centered,
                 training);
}

namespace {

using AmaxSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                         const OptionalTensor&,
                                                         const OptionalTensor&, std::string_view,
                                                         double, bool, const OptionalTensor&);

NormWithAmax call_with_amax(const Tensor& x, const NormInputs& in) {
  static const auto op = find_op<AmaxSignature>("redline::norm_with_amax");
  const auto [y, sum, amax] = op.call(x, in.residual, in.weight, in.bias, name(in.norm), in.epsilon,
                                      in.zero_centered, in.row_count);
  return {y, in.residual ? sum : Tensor(), amax};
}

}  // namespace

NormWithAmax rms_norm_with_amax(const Tensor& x, const OptionalTensor& residual,
                                const OptionalTensor& weight, double epsilon, bool zero_centered,
                                const OptionalTensor& row_count) {
  return call_with_amax(x, {Norm::rms, residual, weight, {}, row_count, epsilon, zero_centered});
}

NormWithAmax layer_norm_with_amax(const Tensor& x, const OptionalTensor& residual,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  double epsilon, bool zero_centered,
                                  const OptionalTensor& row_count) {
  return call_with_amax(x,
                        {Norm::layer, residual, weight, bias, row_count, epsilon, zero_centered});
}

namespace {

// The public ops of one dispatch key: `Run` takes x and Inputs and returns what results_of() does.
template <variable_list (*Run)(const Tensor&, const NormInputs&)>
struct Public {
  static Tensor rms(const Tensor& x, const OptionalTensor& weight, double epsilon,
                    bool zero_centered, const OptionalTensor& row_count) {
    return Run(x, {Norm::rms, {}, weight, {}, row_count, epsilon, zero_centered})[0];
  }
  static Tensor layer(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      double epsilon, bool zero_centered, const OptionalTensor& row_count) {
    return Run(x, {Norm::layer, {}, weight, bias, row_count, epsilon, zero_centered})[0];
  }
  static std::tuple<Tensor, Tensor> residual_rms(const Tensor& x, const Tensor& residual,
                                                 const OptionalTensor& weight, double epsilon,
                                                 bool zero_centered,
                                                 const OptionalTensor& row_count) {
    const auto out = Run(x, {Norm::rms, residual, weight, {}, row_count, epsilon, zero_centered});
    return {out[0], out[1]};
  }
  static std::tuple<Tensor, Tensor> residual_layer(const Tensor& x, const Tensor& residual,
                                                   const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double epsilon,
                                                   bool zero_centered,
                                                   const OptionalTensor& row_count) {
    const auto out =
        Run(x, {Norm::layer, residual, weight, bias, row_count, epsilon, zero_centered});
    return {out[0], out[1]};
  }
  // sum: [0] without a residual.
  static std::tuple<Tensor, Tensor, Tensor> with_amax(
      const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
      const OptionalTensor& bias, std::string_view norm, double epsilon, bool zero_centered,
      const OptionalTensor& row_count) {
    const Norm kind = norm_from("norm_with_amax", norm);
    TORCH_CHECK(kind == Norm::layer || !bias, norm, ": bias: expected none");
    const auto out = Run(x, {.norm = kind,
                             .residual = residual,
                             .weight = weight,
                             .bias = bias,
                             .row_count = row_count,
                             .epsilon = epsilon,
                             .zero_centered = zero_centered,
                             .wants_amax = true});
    return {out[0], residual ? out[1] : at::empty({0}, x.options()), out.back()};
  }
  // The probability is refused outside of training too.
  static std::tuple<Tensor, Tensor> dropped(const Tensor& x, NormInputs in, double probability,
                                            bool training) {
    check_probability(name(in.norm), probability);
    if (training) in.dropout = probability;
    const auto out = Run(x, in);
    return {out[0], out[1]};
  }
  static std::tuple<Tensor, Tensor> dropout_rms(const Tensor& x, const OptionalTensor& input_bias,
                                                const Tensor& residual, double probability,
                                                const OptionalTensor& weight, double epsilon,
                                                bool zero_centered, bool training) {
    return dropped(x, {Norm::rms, residual, weight, {}, {}, epsilon, zero_centered, input_bias},
                   probability, training);
  }
  static std::tuple<Tensor, Tensor> dropout_layer(const Tensor& x, const OptionalTensor& input_bias,
                                                  const Tensor& residual, double probability,
                                                  const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double epsilon,
                                                  bool zero_centered, bool training) {
    return dropped(x, {Norm::layer, residual, weight, bias, {}, epsilon, zero_centered, input_bias},
                   probability, training);
  }
  static void implement(torch::Library& m) {
    m.impl("rms_norm", rms);
    m.impl("layer_norm", layer);
    m.impl("residual_rms_norm", residual_rms);
    m.impl("residual_layer_norm", residual_layer);
    m.impl("norm_with_amax", with_amax);
    m.impl("bias_dropout_residual_rms_norm", dropout_rms);
    m.impl("bias_dropout_residual_layer_norm", dropout_layer);
  }
};

variable_list without_derivative(const Tensor& x, const NormInputs& in) {
  check_given(x, in);
  return results_of(norm_forward(x, in), in);
}

// torch runs layer_norm in float32 under CUDA autocast; rms_norm has no rule there.
variable_list in_float32(const Tensor& x, const NormInputs& in) {
  const c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastCUDA);
  if (in.norm == Norm::rms) {
    const NormWithAmax out = call_with_amax(x, in);
    return {out.y, out.sum, out.amax};
  }
  const auto cast = [](const OptionalTensor& tensor) {
    return at::autocast::cached_cast(at::kFloat, tensor, c10::DeviceType::CUDA);
  };
  const Tensor wide = at::autocast::cached_cast(at::kFloat, x, c10::DeviceType::CUDA);
  if (in.input_bias || in.dropout > 0) {
    const auto [y, sum] = bias_dropout_residual_layer_norm(
        wide, cast(in.input_bias), *cast(in.residual), in.dropout, cast(in.weight), cast(in.bias),
        in.epsilon, in.zero_centered, /*training=*/true);
    return {y, sum};
  }
  if (in.wants_amax) {
    const NormWithAmax out =
        layer_norm_with_amax(wide, cast(in.residual), cast(in.weight), cast(in.bias), in.epsilon,
                             in.zero_centered, in.row_count);
    return {out.y, out.sum, out.amax};
  }
  if (in.residual) {
    const auto [y, sum] =
        residual_layer_norm(wide, *cast(in.residual), cast(in.weight), cast(in.bias), in.epsilon,
                            in.zero_centered, in.row_count);
    return {y, sum};
  }
  return {
      layer_norm(wide, cast(in.weight), cast(in.bias), in.epsilon, in.zero_centered, in.row_count)};
}

void implement_autocast_cuda(torch::Library& m) {
  ignore_autocast(m, {"rms_norm", "residual_rms_norm", "bias_dropout_residual_rms_norm"});
  m.impl("layer_norm", Public<in_float32>::layer);
  m.impl("norm_with_amax", Public<in_float32>::with_amax);
  m.impl("residual_layer_norm", Public<in_float32>::residual_layer);
  m.impl("bias_dropout_residual_layer_norm", Public<in_float32>::dropout_layer);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "rms_norm(Tensor x, Tensor? weight=None, float epsilon=1e-5, bool zero_centered=False, *, "
      "Tensor? row_count=None) -> Tensor");
  m.def(
      "layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float epsilon=1e-5, "
      "bool zero_centered=False, *, Tensor? row_count=None) -> Tensor");
  m.def(
      "residual_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float epsilon=1e-5, "
      "bool zero_centered=False, *, Tensor? row_count=None) -> (Tensor y, Tensor sum)");
  m.def(
      "residual_layer_norm(Tensor x, Tensor residual, Tensor? weight=None, Tensor? bias=None, "
      "float epsilon=1e-5, bool zero_centered=False, *, Tensor? row_count=None) "
      "-> (Tensor y, Tensor sum)");
  m.def(
      "norm_with_amax(Tensor x, Tensor? residual=None, Tensor? weight=None, Tensor? bias=None, "
      "str norm=\"rms_norm\", float epsilon=1e-5, bool zero_centered=False, *, "
      "Tensor? row_count=None) -> (Tensor y, Tensor sum, Tensor amax)");
  const std::vector<at::Tag> random = {at::Tag::nondeterministic_seeded};
  m.def(
      "bias_dropout_residual_rms_norm(Tensor x, Tensor? input_bias, Tensor residual, "
      "float probability, Tensor? weight=None, float epsilon=1e-5, bool zero_centered=False, *, "
      "bool training=True) -> (Tensor y, Tensor sum)",
      random);
  m.def(
      "bias_dropout_residual_layer_norm(Tensor x, Tensor? input_bias, Tensor residual, "
      "float probability, Tensor? weight=None, Tensor? bias=None, float epsilon=1e-5, "
      "bool zero_centered=False, *, bool training=True) -> (Tensor y, Tensor sum)",
      random);
}

const Registration registration({
    .public_ops = {"rms_norm", "layer_norm", "residual_rms_norm", "residual_layer_norm",
                   "norm_with_amax", "bias_dropout_residual_rms_norm",
                   "bias_dropout_residual_layer_norm"},
    .without_derivative = Public<without_derivative>::implement,
    .differentiable = Public<differentiable>::implement,
    .autocast_cuda = implement_autocast_cuda,
});

}  // namespace redline::ops
