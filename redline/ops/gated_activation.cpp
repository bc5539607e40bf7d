#include "redline/ops/gated_activation.h"

#include "redline/kernels/gated_activation.h"
#include "redline/ops/below_autograd.h"
#include "redline/ops/column_sums.h"
#include "redline/ops/registration.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Options = GatedActivationOptions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* op_name = "gated_activation";

// The numbers of the kind; the three parameters belong to clamped_swiglu alone.
GatedActivationKind kind_from(const Options& options) {
  GatedActivationKind kind{.kind = gated_activation_from(options.kind)};
  for (const auto& [name, given, number] :
       {std::tuple("limit", &options.limit, &kind.limit),
        std::tuple("alpha", &options.alpha, &kind.alpha),
        std::tuple("linear_offset", &options.linear_offset, &kind.linear_offset)}) {
    if (!*given) continue;
    TORCH_CHECK(kind.kind == GatedActivation::clamped_swiglu, op_name, ": ", name,
                ": expected none with kind ", options.kind, ", not ", **given);
    *number = **given;
  }
  TORCH_CHECK(kind.limit > 0, op_name, ": limit: expected more than 0, not ", kind.limit);
  return kind;
}

void check_input(const char* tensor, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, op_name, ": ", tensor,
              ": expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op_name, ": ", tensor,
              ": expected a floating dtype, not ", x.scalar_type());
}

// `linear` is given in the pair form. The packed form has both halves in x.
void check_inputs(const Tensor& x, const OptionalTensor& linear, const Options& options) {
  check_input(linear ? "gate" : "x", x);
  check_devices(op_name, x,
                {{"linear", linear},
                 {"bias", options.bias},
                 {"row_scale", options.row_scale},
                 {"row_count", options.row_count}});
  if (linear) {
    TORCH_CHECK(linear->sym_sizes() == x.sym_sizes(), op_name, ": linear: expected ", x.sym_sizes(),
                ", not ", linear->sym_sizes());
  } else {
    TORCH_CHECK(x.sym_size(-1) % 2 == 0, op_name,
                ": x: expected an even last size, gate and linear side by side, not ",
                x.sym_size(-1));
  }
}

Tensor empty_output(const Tensor& x, const OptionalTensor& linear) {
  if (linear) return empty_contiguous(x);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = sizes.back() / 2;
  return empty_of(sizes, x.options());
}

struct Halves {
  TensorView gate, linear;
};

// From tensors that came from with_rows(): two, or the two halves of one.
Halves halves(const Tensor& x, const Tensor& linear) {
  if (linear.defined()) return {view_rows(x), view_rows(linear)};
  TensorView gate = view_rows(x);
  gate.sizes[1] /= 2;
  TensorView second = gate;
  second.data = gate.as<char>() + gate.sizes[1] * element_bytes(gate.dtype);
  return {gate, second};
}

Tensor forward(const Tensor& x, const OptionalTensor& linear, const Options& options) {
  const GatedActivationKind kind = kind_from(options);
  check_inputs(x, linear, options);
  Tensor y = empty_output(x, linear);
  if (x.is_meta()) return y;
  const Tensor x_rows = with_rows(op_name, linear ? "gate" : "x", x),
               linear_rows = with_rows(op_name, "linear", value(linear));
  const OptionalTensor bias = contiguous(op_name, "bias", options.bias),
                       row_scale = contiguous(op_name, "row_scale", options.row_scale);
  const auto [gate_view, linear_view] = halves(x_rows, linear_rows);
  const GatedActivationForward args{.activation = kind,
                                    .gate = gate_view,
                                    .linear = linear_view,
                                    .bias = view(bias),
                                    .row_scale = view_vector(row_scale),
                                    .row_count = view(options.row_count),
                                    .y = view_rows(y),
                                    .quantized = {}};
  run_rows(x, args, args.gate.sizes[0], args.gate.sizes[1]);
  return y;
}

struct Gradients {
  Tensor x, linear, bias, row_scale;  // x: the packed gradient, or the gate's
  Tensor y = {};                      // forward's once more
};

// What backward is asked for beside the inputs' gradients.
struct Needs {
  bool bias, row_scale, y = false;
};

// CUDA's workspace for the sums over a row beside those over rows.
Tensor row_parts(const Tensor& x, const TensorView& gate, Needs needs) {
  if constexpr (with_cuda) {
    if (x.is_cuda() && needs.bias && needs.row_scale) {
      return at::empty({cuda::row_parts(gate.dtype, gate.sizes[1]), gate.sizes[0]},
                       x.options().dtype(at::kFloat));
    }
  }
  return {};
}

Gradients backward(const Tensor& y_grad, const Tensor& x, const OptionalTensor& linear,
                   const Options& options, Needs needs) {
  const GatedActivationKind kind = kind_from(options);
  check_inputs(x, linear, options);
  check_devices(op_name, x, {{"y_grad", y_grad}});
  const auto like = [&](const char* name, bool wanted, const OptionalTensor& tensor) {
    return empty_gradient(op_name, name, tensor, wanted);
  };
  const Gradients out = {empty_contiguous(x), like("linear", linear.has_value(), linear),
                         like("bias", needs.bias, options.bias),
                         like("row_scale", needs.row_scale, options.row_scale),
                         needs.y ? empty_output(x, linear) : Tensor()};
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(op_name, linear ? "gate" : "x", x),
               linear_rows = with_rows(op_name, "linear", value(linear)),
               y_grad_rows = with_rows(op_name, "y_grad", y_grad);
  const OptionalTensor bias = contiguous(op_name, "bias", options.bias),
                       row_scale = contiguous(op_name, "row_scale", options.row_scale);
  const auto [gate_view, linear_view] = halves(x_rows, linear_rows);
  const auto [gate_grad, linear_grad] = halves(out.x, linear ? out.linear : Tensor());
  const Tensor partial = column_partial(out.bias, needs.bias, gate_view, cuda::gated_column_blocks);
  const Tensor parts = row_parts(x, gate_view, needs);
  const GatedActivationBackward args{
      .activation = kind,
      .y_grad = view_rows(y_grad_rows),
      .gate = gate_view,
      .linear = linear_view,
      .bias = view(bias),
      .row_scale = view_vector(row_scale),
      .row_count = view(options.row_count),
      .gate_grad = gate_grad,
      .linear_grad = linear_grad,
      .row_scale_grad = needs.row_scale ? view_vector(out.row_scale) : TensorView{},
      .row_parts = view(parts),
      .bias_grad = column_sums(partial, out.bias),
      .y = view_rows(out.y)};
  if (!needs.bias) {
    run_rows(x, args, args.gate.sizes[0], args.gate.sizes[1]);
  } else if (!run_on_cuda(x, args)) {
    run_chunks(args, args.bias_grad);
  }
  return out;
}

// --- inner ops ----------------------------------------------------------------------------------

Tensor gated_activation_forward(const Tensor& x, const OptionalTensor& linear,
                                std::string_view kind, const OptionalTensor& bias,
                                const OptionalTensor& row_scale, std::optional<double> limit,
                                std::optional<double> alpha, std::optional<double> linear_offset,
                                const OptionalTensor& row_count) {
  return forward(x, linear,
                 {std::string(kind), bias, row_scale, limit, alpha, linear_offset, row_count});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_activation_backward(
    const Tensor& y_grad, const Tensor& x, const OptionalTensor& linear, std::string_view kind,
    const OptionalTensor& bias, const OptionalTensor& row_scale, std::optional<double> limit,
    std::optional<double> alpha, std::optional<double> linear_offset,
    const OptionalTensor& row_count, bool needs_bias, bool needs_row_scale) {
  const Gradients out =
      backward(y_grad, x, linear,
               {std::string(kind), bias, row_scale, limit, alpha, linear_offset, row_count},
               {.bias = needs_bias, .row_scale = needs_row_scale});
  return {out.x, out.linear, out.bias, out.row_scale};
}

// Of the packed form.
std::tuple<Tensor, Tensor, Tensor> gated_activation_backward_rebuild(const Tensor& y_grad,
                                                                     const Tensor& x,
                                                                     const OptionalTensor& bias,
                                                                     std::string_view kind,
                                                                     bool needs_bias) {
  const Gradients out = backward(y_grad, x, {}, {.kind = std::string(kind), .bias = bias},
                                 {.bias = needs_bias, .row_scale = false, .y = true});
  return {out.x, out.bias, out.y};
}

// Through the dispatcher, so that tracing sees the inner ops.
Tensor call_forward(const Tensor& x, const OptionalTensor& linear, const Options& in) {
  static const auto op =
      find_op<decltype(gated_activation_forward)>("redline::gated_activation_forward");
  return op.call(x, linear, in.kind, in.bias, in.row_scale, in.limit, in.alpha, in.linear_offset,
                 in.row_count);
}

Gradients call_backward(const Tensor& y_grad, const variable_list& saved, const Options& in,
                        bool needs_bias, bool needs_row_scale) {
  static const auto op =
      find_op<decltype(gated_activation_backward)>("redline::gated_activation_backward");
  const auto [x_grad, linear_grad, bias_grad, row_scale_grad] = op.call(
      y_grad, saved[0], optional(saved[1]), in.kind, optional(saved[2]), optional(saved[3]),
      in.limit, in.alpha, in.linear_offset, optional(saved[4]), needs_bias, needs_row_scale);
  return {x_grad, linear_grad, bias_grad, row_scale_grad};
}

// --- derivative ---------------------------------------------------------------------------------

struct GatedActivationFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& linear,
                               const OptionalTensor& bias, const OptionalTensor& row_scale,
                               const OptionalTensor& row_count, const Options& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, value(linear), value(bias), value(row_scale), value(row_count)});
    ctx->saved_data["kind"] = in.kind;
    ctx->saved_data["limit"] = in.limit;
    ctx->saved_data["alpha"] = in.alpha;
    ctx->saved_data["linear_offset"] = in.linear_offset;
    return {call_forward(x, linear, in)};
  }

  // Inputs of forward in order: x, linear, bias, row_scale, row_count, in. The graph has edges for
  // the tensors that were given.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const bool pair = saved[1].defined();
    int64_t edge = pair ? 2 : 1;
    const bool needs_bias = saved[2].defined() && ctx->needs_input_grad(edge);
    edge += saved[2].defined();
    const bool needs_row_scale = saved[3].defined() && ctx->needs_input_grad(edge);
    Options in;
    in.kind = ctx->saved_data["kind"].toStringRef();
    in.limit = ctx->saved_data["limit"].toOptional<double>();
    in.alpha = ctx->saved_data["alpha"].toOptional<double>();
    in.linear_offset = ctx->saved_data["linear_offset"].toOptional<double>();
    const Gradients out = call_backward(grads[0], saved, in, needs_bias, needs_row_scale);
    return {out.x,
            pair ? out.linear : Tensor(),
            needs_bias ? out.bias : Tensor(),
            needs_row_scale ? out.row_scale : Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor differentiable(const Tensor& x, const OptionalTensor& linear, const Options& in) {
  TORCH_CHECK(x.defined(), op_name, ": x: expected a tensor, not None");
  return StrictNode<GatedActivationFunction>::apply(x, linear, in.bias, in.row_scale, in.row_count,
                                                    in)[0];
}

// The public ops of one dispatch key.
template <Tensor (*Run)(const Tensor&, const OptionalTensor&, const Options&)>
struct Public {
  static Tensor packed(const Tensor& x, std::string_view kind, const OptionalTensor& bias,
                       const OptionalTensor& row_scale, std::optional<double> limit,
                       std::optional<double> alpha, std::optional<double> linear_offset,
                       const OptionalTensor& row_count) {
    return Run(x, {}, {std::string(kind), bias, row_scale, limit, alpha, linear_offset, row_count});
  }
  static Tensor pair(const Tensor& gate, const Tensor& linear, std::string_view kind,
                     const OptionalTensor& bias, const OptionalTensor& row_scale,
                     std::optional<double> limit, std::optional<double> alpha,
                     std::optional<double> linear_offset, const OptionalTensor& row_count) {
    return Run(gate, linear,
               {std::string(kind), bias, row_scale, limit, alpha, linear_offset, row_count});
  }
  static void implement(torch::Library& m) {
    m.impl("gated_activation", packed);
    m.impl("gated_activation_pair", pair);
  }
};

void implement_inner(torch::Library& m) {
  m.impl("gated_activation_forward", gated_activation_forward);
  m.impl("gated_activation_backward", gated_activation_backward);
  m.impl("gated_activation_backward_rebuild", gated_activation_backward_rebuild);
}

}  // namespace

// --- public ops ---------------------------------------------------------------------------------

Tensor gated_activation(const Tensor& x, const Options& in) {
  static const auto op =
      find_op<decltype(Public<differentiable>::packed)>("redline::gated_activation");
  return op.call(x, in.kind, in.bias, in.row_scale, in.limit, in.alpha, in.linear_offset,
                 in.row_count);
}

Tensor gated_activation_pair(const Tensor& gate, const Tensor& linear, const Options& in) {
  static const auto op =
      find_op<decltype(Public<differentiable>::pair)>("redline::gated_activation_pair");
  return op.call(gate, linear, in.kind, in.bias, in.row_scale, in.limit, in.alpha, in.linear_offset,
                 in.row_count);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "gated_activation(Tensor x, *, str kind=\"swiglu\", Tensor? bias=None, "
      "Tensor? row_scale=None, float? limit=None, float? alpha=None, float? linear_offset=None, "
      "Tensor? row_count=None) -> Tensor");
  m.def(
      "gated_activation_pair(Tensor gate, Tensor linear, *, str kind=\"swiglu\", "
      "Tensor? bias=None, Tensor? row_scale=None, float? limit=None, float? alpha=None, "
      "float? linear_offset=None, Tensor? row_count=None) -> Tensor");
  m.def(
      "gated_activation_forward(Tensor x, Tensor? linear, str kind, Tensor? bias, "
      "Tensor? row_scale, float? limit, float? alpha, float? linear_offset, Tensor? row_count) "
      "-> Tensor");
  m.def(
      "gated_activation_backward(Tensor y_grad, Tensor x, Tensor? linear, str kind, Tensor? bias, "
      "Tensor? row_scale, float? limit, float? alpha, float? linear_offset, Tensor? row_count, "
      "bool needs_bias, bool needs_row_scale) "
      "-> (Tensor x_grad, Tensor linear_grad, Tensor bias_grad, Tensor row_scale_grad)");
  m.def(
      "gated_activation_backward_rebuild(Tensor y_grad, Tensor x, Tensor? bias, str kind, "
      "bool needs_bias) -> (Tensor x_grad, Tensor bias_grad, Tensor y)");
}

const Registration registration({
    .public_ops = {"gated_activation", "gated_activation_pair"},
    .inner_ops = {"gated_activation_forward", "gated_activation_backward",
                  "gated_activation_backward_rebuild"},
    .inner = implement_inner,
    .without_derivative = Public<call_forward>::implement,
    .differentiable = Public<differentiable>::implement,
});

}  // namespace redline::ops
