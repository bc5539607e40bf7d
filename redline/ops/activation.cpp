#include "redline/ops/activation.h"

#include "redline/kernels/activation.h"
#include "redline/ops/below_autograd.h"
#include "redline/ops/column_sums.h"
#include "redline/ops/registration.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* op_name = "activation";

void check_input(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, op_name, ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op_name, ": x: expected a floating dtype, not ",
              x.scalar_type());
}

// --- inner ops ----------------------------------------------------------------------------------

Tensor activation_forward(const Tensor& x, const OptionalTensor& bias, std::string_view kind) {
  check_input(x);
  check_devices(op_name, x, {{"bias", bias}});
  const Activation activation = activation_from(kind);
  Tensor y = empty_contiguous(x);
  if (x.is_meta()) return y;
  const Tensor x_rows = with_rows(op_name, "x", x);
  const OptionalTensor bias_vector = contiguous(op_name, "bias", bias);
  const bool flat = !bias && x_rows.is_contiguous();
  const ActivationForward args{.kind = activation,
                               .x = flat ? view_flat(x_rows) : view_rows(x_rows),
                               .bias = view(bias_vector),
                               .y = flat ? view_flat(y) : view_rows(y),
                               .quantized = {}};
  run_elements(x, args, x.numel());
  return y;
}

// What backward is asked for beside x_grad.
struct Needs {
  bool bias, y;
};

struct BackwardOutputs {
  Tensor x_grad, bias_grad, y;  // y: forward's once more, undefined where it is not needed
};

BackwardOutputs backward(const Tensor& y_grad, const Tensor& x, const OptionalTensor& bias,
                         std::string_view kind, Needs needs) {
  check_input(x);
  check_devices(op_name, x, {{"y_grad", y_grad}, {"bias", bias}});
  const Activation activation = activation_from(kind);
  Tensor x_grad = empty_contiguous(x);
  Tensor bias_grad = empty_gradient(op_name, "bias", bias, needs.bias);
  const Tensor y = needs.y ? empty_contiguous(x_grad) : Tensor();
  if (x.is_meta()) return {x_grad, bias_grad, y};
  const Tensor x_rows = with_rows(op_name, "x", x),
               y_grad_rows = with_rows(op_name, "y_grad", y_grad);
  const OptionalTensor bias_vector = contiguous(op_name, "bias", bias);
  const bool flat = !bias && x_rows.is_contiguous() && y_grad_rows.is_contiguous();
  const auto viewed = [flat](const Tensor& t) {
    return flat && t.defined() ? view_flat(t) : view_rows(t);
  };
  const TensorView x_view = viewed(x_rows);
  const Tensor partial =
      column_partial(bias_grad, needs.bias, x_view, cuda::activation_column_blocks);
  const ActivationBackward args{.kind = activation,
                                .y_grad = viewed(y_grad_rows),
                                .x = x_view,
                                .bias = view(bias_vector),
                                .x_grad = viewed(x_grad),
                                .bias_grad = column_sums(partial, bias_grad),
                                .y = viewed(y)};
  if (!needs.bias) {
    run_elements(x, args, x.numel());
  } else if (!run_on_cuda(x, args)) {
    run_chunks(args, args.bias_grad);
  }
  return {x_grad, bias_grad, y};
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& y_grad, const Tensor& x,
                                               const OptionalTensor& bias, std::string_view kind,
                                               bool needs_bias) {
  const BackwardOutputs out = backward(y_grad, x, bias, kind, {.bias = needs_bias, .y = false});
  return {out.x_grad, out.bias_grad};
}

std::tuple<Tensor, Tensor, Tensor> activation_backward_rebuild(const Tensor& y_grad,
                                                               const Tensor& x,
                                                               const OptionalTensor& bias,
                                                               std::string_view kind,
                                                               bool needs_bias) {
  const BackwardOutputs out = backward(y_grad, x, bias, kind, {.bias = needs_bias, .y = true});
  return {out.x_grad, out.bias_grad, out.y};
}

// Through the dispatcher, so that tracing sees the inner op.
Tensor call_forward(const Tensor& x, const OptionalTensor& bias, std::string_view kind) {
  static const auto op = find_op<decltype(activation_forward)>("redline::activation_forward");
  return op.call(x, bias, kind);
}

// --- derivative ---------------------------------------------------------------------------------

struct ActivationFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias,
                               const std::string& kind) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, value(bias)});
    ctx->saved_data["kind"] = kind;
    return {call_forward(x, bias, kind)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(activation_backward)>("redline::activation_backward");
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const bool needs_bias = saved[1].defined() && ctx->needs_input_grad(1);
    const auto [x_grad, bias_grad] = op.call(grads[0], saved[0], optional(saved[1]),
                                             ctx->saved_data["kind"].toStringRef(), needs_bias);
    return {x_grad, needs_bias ? bias_grad : Tensor(), Tensor()};
  }
};

Tensor differentiable(const Tensor& x, const OptionalTensor& bias, std::string_view kind) {
  TORCH_CHECK(x.defined(), op_name, ": x: expected a tensor, not None");
  return StrictNode<ActivationFunction>::apply(x, bias, std::string(kind))[0];
}

void implement_inner(torch::Library& m) {
  m.impl("activation_forward", activation_forward);
  m.impl("activation_backward", activation_backward);
  m.impl("activation_backward_rebuild", activation_backward_rebuild);
}

}  // namespace

// --- public op ----------------------------------------------------------------------------------

Tensor activation(const Tensor& x, const OptionalTensor& bias, std::string_view kind) {
  static const auto op = find_op<decltype(activation)>("redline::activation");
  return op.call(x, bias, kind);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def("activation(Tensor x, Tensor? bias=None, str kind=\"gelu\") -> Tensor");
  m.def("activation_forward(Tensor x, Tensor? bias, str kind) -> Tensor");
  m.def(
      "activation_backward(Tensor y_grad, Tensor x, Tensor? bias, str kind, bool needs_bias) "
      "-> (Tensor x_grad, Tensor bias_grad)");
  m.def(
      "activation_backward_rebuild(Tensor y_grad, Tensor x, Tensor? bias, str kind, "
      "bool needs_bias) -> (Tensor x_grad, Tensor bias_grad, Tensor y)");
}

const Registration registration({
    .public_ops = {"activation"},
    .inner_ops = {"activation_forward", "activation_backward", "activation_backward_rebuild"},
    .inner = implement_inner,
    .without_derivative = [](torch::Library& m) { m.impl("activation", call_forward); },
    .differentiable = [](torch::Library& m) { m.impl("activation", differentiable); },
});

}  // namespace redline::ops
