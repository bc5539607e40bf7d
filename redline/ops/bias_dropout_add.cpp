#include "redline/ops/bias_dropout_add.h"

#include "redline/kernels/bias_dropout_add.h"
#include "redline/ops/below_autograd.h"
#include "redline/ops/column_sums.h"
#include "redline/ops/philox.h"
#include "redline/ops/registration.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* op_name = "bias_dropout_add";

void check_inputs(const Tensor& x, const OptionalTensor& bias, const Tensor& residual) {
  TORCH_CHECK(x.dim() >= 1, op_name, ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op_name, ": x: expected a floating dtype, not ",
              x.scalar_type());
  check_devices(op_name, x, {{"bias", bias}, {"residual", residual}});
  TORCH_CHECK(residual.sym_sizes() == x.sym_sizes(), op_name, ": residual: expected ",
              x.sym_sizes(), ", not ", residual.sym_sizes());
}

// --- inner ops ----------------------------------------------------------------------------------

// rng_state: [2] int64, or [0] where nothing is dropped.
std::tuple<Tensor, Tensor> bias_dropout_add_forward(const Tensor& x, const OptionalTensor& bias,
                                                    const Tensor& residual, double probability,
                                                    bool training) {
  check_probability(op_name, probability);
  check_inputs(x, bias, residual);
  const bool random = training && probability > 0;
  Tensor y = empty_contiguous(residual);
  Tensor rng_state = at::empty({random ? 2 : 0}, x.options().dtype(at::kLong));
  if (x.is_meta()) return {y, rng_state};
  const Tensor x_rows = with_rows(op_name, "x", x),
               residual_rows = with_rows(op_name, "residual", residual);
  const OptionalTensor bias_vector = contiguous(op_name, "bias", bias);
  const bool flat = !bias && x_rows.is_contiguous() && residual_rows.is_contiguous();
  const auto viewed = [flat](const Tensor& t) { return flat ? view_flat(t) : view_rows(t); };
  BiasDropoutAddForward args{.x = viewed(x_rows),
                             .bias = view(bias_vector),
                             .residual = viewed(residual_rows),
                             .y = viewed(y),
                             .rng_state = random ? view(rng_state) : TensorView{},
                             .philox = {},
                             .probability = random ? probability : 0};
  check(args);  // a refused call draws nothing
  if (random) args.philox = draw_philox(x);
  run_elements(x, args, x.numel());
  if (x.is_cpu() && x.numel() == 0) run(args, Range{});  // writes rng_state
  return {y, rng_state};
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& y_grad, const Tensor& rng_state,
                                                     const OptionalTensor& bias,
                                                     at::ScalarType x_dtype, double probability,
                                                     bool needs_bias) {
  check_probability(op_name, probability);
  check_devices(op_name, y_grad, {{"rng_state", rng_state}, {"bias", bias}});
  TORCH_CHECK(y_grad.dim() >= 1, op_name,
              ": y_grad: expected at least one dimension, not a scalar");
  Tensor x_grad = empty_contiguous(y_grad, x_dtype);
  Tensor bias_grad = empty_gradient(op_name, "bias", bias, needs_bias);
  if (y_grad.is_meta()) return {x_grad, bias_grad};
  const Tensor y_grad_rows = with_rows(op_name, "y_grad", y_grad);
  const bool flat = !needs_bias && y_grad_rows.is_contiguous();
  const auto viewed = [flat](const Tensor& t) { return flat ? view_flat(t) : view_rows(t); };
  const TensorView x_grad_view = viewed(x_grad);
  const Tensor partial = column_partial(bias_grad, needs_bias, x_grad_view);
  const BiasDropoutAddBackward args{
      .y_grad = viewed(y_grad_rows),
      .rng_state = rng_state.numel() > 0 ? view(rng_state) : TensorView{},
      .x_grad = x_grad_view,
      .bias_grad = column_sums(partial, bias_grad),
      .probability = probability};
  if (!needs_bias) {
    run_elements(y_grad, args, y_grad.numel());
  } else if (!run_on_cuda(y_grad, args)) {
    run_chunks(args, args.bias_grad);
  }
  return {x_grad, bias_grad};
}

// Through the dispatcher, so that tracing sees the inner ops.
std::tuple<Tensor, Tensor> call_forward(const Tensor& x, const OptionalTensor& bias,
                                        const Tensor& residual, double probability, bool training) {
  static const auto op =
      find_op<decltype(bias_dropout_add_forward)>("redline::bias_dropout_add_forward");
  return op.call(x, bias, residual, probability, training);
}

// --- derivative ---------------------------------------------------------------------------------

struct BiasDropoutAddFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias,
                               const Tensor& residual, double probability, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, rng_state] = call_forward(x, bias, residual, probability, training);
    ctx->save_for_backward({rng_state, value(bias)});
    const bool random = training && probability > 0;
    ctx->saved_data["node"] = static_cast<int64_t>(x.scalar_type()) << 1 | random;
    if (random || bias) ctx->saved_data["probability"] = probability;
    return {y};
  }

  // Inputs of forward in order: x, bias, residual, probability, training. The graph has edges for
  // the tensors that were given.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_op<decltype(bias_dropout_add_backward)>("redline::bias_dropout_add_backward");
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const Tensor &y_grad = grads[0], &bias = saved[1];
    const int64_t node = ctx->saved_data["node"].toInt();
    const auto x_dtype = static_cast<at::ScalarType>(node >> 1);
    const bool needs_bias = bias.defined() && ctx->needs_input_grad(1);
    if (!needs_bias && (node & 1) == 0) {
      const bool same = y_grad.scalar_type() == x_dtype;
      return {same ? y_grad : y_grad.to(x_dtype), Tensor(), y_grad, Tensor(), Tensor()};
    }
    const auto [x_grad, bias_grad] = op.call(y_grad, saved[0], optional(bias), x_dtype,
                                             ctx->saved_data["probability"].toDouble(), needs_bias);
    return {x_grad, needs_bias ? bias_grad : Tensor(), y_grad, Tensor(), Tensor()};
  }
};

Tensor differentiable(const Tensor& x, const OptionalTensor& bias, const Tensor& residual,
                      double probability, bool training) {
  TORCH_CHECK(x.defined(), op_name, ": x: expected a tensor, not None");
  TORCH_CHECK(residual.defined(), op_name, ": residual: expected a tensor, not None");
  return StrictNode<BiasDropoutAddFunction>::apply(x, bias, residual, probability, training)[0];
}

Tensor without_derivative(const Tensor& x, const OptionalTensor& bias, const Tensor& residual,
                          double probability, bool training) {
  return std::get<0>(call_forward(x, bias, residual, probability, training));
}

void implement_inner(torch::Library& m) {
  m.impl("bias_dropout_add_forward", bias_dropout_add_forward);
  m.impl("bias_dropout_add_backward", bias_dropout_add_backward);
}

}  // namespace

// --- public op ----------------------------------------------------------------------------------

Tensor bias_dropout_add(const Tensor& x, const OptionalTensor& bias, const Tensor& residual,
                        double probability, bool training) {
  static const auto op = find_op<decltype(bias_dropout_add)>("redline::bias_dropout_add");
  return op.call(x, bias, residual, probability, training);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  // Untagged, a checkpointed region under torch.compile would draw another mask.
  const std::vector<at::Tag> random = {at::Tag::nondeterministic_seeded};
  m.def(
      "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, float probability, "
      "bool training=True) -> Tensor",
      random);
  m.def(
      "bias_dropout_add_forward(Tensor x, Tensor? bias, Tensor residual, float probability, "
      "bool training) -> (Tensor y, Tensor rng_state)",
      random);
  m.def(
      "bias_dropout_add_backward(Tensor y_grad, Tensor rng_state, Tensor? bias, "
      "ScalarType x_dtype, float probability, bool needs_bias) "
      "-> (Tensor x_grad, Tensor bias_grad)");
}

const Registration registration({
    .public_ops = {"bias_dropout_add"},
    .inner_ops = {"bias_dropout_add_forward", "bias_dropout_add_backward"},
    .inner = implement_inner,
    .without_derivative = [](torch::Library& m) { m.impl("bias_dropout_add", without_derivative); },
    .differentiable = [](torch::Library& m) { m.impl("bias_dropout_add", differentiable); },
});

}  // namespace redline::ops
