// Over budget: lines: four ops of one family; their schemas and registrations alone are 80 lines.
#include "redline/ops/norm.h"

#include "redline/kernels/column_sums.h"
#include "redline/kernels/norm.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const char* op_name(Norm norm) { return norm == Norm::rms ? "rms_norm" : "layer_norm"; }

// One statistic per row: the leading sizes of x, kept symbolic.
Tensor empty_statistic(const Tensor& x) {
  return at::empty_symint(x.sym_sizes().slice(0, x.dim() - 1),
                          x.options().dtype(accumulation_type(x)));
}

void check_input(Norm norm, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, op_name(norm), ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op_name(norm),
              ": x: expected a floating dtype, not ", x.scalar_type());
}

struct Outputs {
  Tensor y, sum, mean, inverse_std;
};

struct Inputs {
  Norm norm;
  OptionalTensor residual, weight, bias, row_count;
  double epsilon;
  bool zero_centered;
};

Outputs forward(const Tensor& x, const Inputs& in) {
  const char* op = op_name(in.norm);
  check_input(in.norm, x);
  check_devices(op, x,
                {{"residual", value(in.residual)},
                 {"weight", value(in.weight)},
                 {"bias", value(in.bias)},
                 {"row_count", value(in.row_count)}});
  if (in.residual) {
    TORCH_CHECK(in.residual->sym_sizes() == x.sym_sizes(), op, ": residual: expected ",
                x.sym_sizes(), ", not ", in.residual->sym_sizes());
  }
  Outputs out;
  out.y = at::empty_like(x, at::MemoryFormat::Contiguous);
  out.sum = in.residual ? at::empty_like(*in.residual, at::MemoryFormat::Contiguous) : no_output(x);
  out.mean = in.norm == Norm::layer ? empty_statistic(x) : Tensor();
  out.inverse_std = empty_statistic(x);
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(x);
  const OptionalTensor residual = with_rows(in.residual), weight = contiguous(in.weight),
                       bias = contiguous(in.bias);
  const NormForward args{.norm = in.norm,
                         .x = view_rows(x_rows),
                         .residual = view_rows(residual),
                         .weight = view(weight),
                         .bias = view(bias),
                         .y = view_rows(out.y),
                         .sum = in.residual ? view_rows(out.sum) : TensorView{},
                         .mean = out.mean.defined() ? view(out.mean.view({-1})) : TensorView{},
                         .inverse_std = view(out.inverse_std.reshape({-1})),
                         .row_count = view(in.row_count),
                         .quantized = {},
                         .epsilon = in.epsilon,
                         .zero_centered = in.zero_centered};
  run_rows(x, args, args.x.sizes[0], args.x.sizes[1]);
  return out;
}

struct Gradients {
  Tensor x, weight, bias;
};

struct BackwardInputs {
  Norm norm;
  Tensor mean, inverse_std;  // mean: layer alone
  OptionalTensor weight, bias, sum_grad, row_count;
  bool zero_centered, needs_weight, needs_bias;
};

int64_t chunk_count(const Tensor& y_grad, const TensorView& rows) {
  if constexpr (with_cuda) {
    if (y_grad.is_cuda()) {
      return cuda::norm_chunks(rows.dtype, rows.sizes[0], rows.sizes[1],
                               stream_of(y_grad).capability);
    }
  }
  return cpu::column_chunks(rows.sizes[0], rows.sizes[1]);
}

Tensor partial_sums(const Tensor& x, int64_t chunks, bool needed) {
  if (!needed) return {};
  return at::empty({chunks, x.size(-1)}, x.options().dtype(accumulation_type(x)));
}

Gradients backward(const Tensor& y_grad, const Tensor& x, const BackwardInputs& in) {
  const char* op = op_name(in.norm);
  check_input(in.norm, x);
  check_devices(
      op, x, {{"y_grad", y_grad}, {"weight", value(in.weight)}, {"sum_grad", value(in.sum_grad)}});
  Gradients out;
  out.x = at::empty_like(x, at::MemoryFormat::Contiguous);
  out.weight = empty_gradient(op, "weight", in.weight, in.needs_weight, x);
  out.bias = empty_gradient(op, "bias", in.bias, in.needs_bias, x);
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(x), y_grad_rows = with_rows(y_grad);
  const OptionalTensor weight = contiguous(in.weight), sum_grad = with_rows(in.sum_grad);
  const int64_t chunks = chunk_count(y_grad, view_rows(y_grad_rows));
  const Tensor weight_partial = partial_sums(x, chunks, in.needs_weight);
  const Tensor bias_partial = partial_sums(x, chunks, in.needs_bias);
  const NormBackward args{.norm = in.norm,
                          .y_grad = view_rows(y_grad_rows),
                          .x = view_rows(x_rows),
                          .weight = view(weight),
                          .mean = in.mean.defined() ? view(in.mean.view({-1})) : TensorView{},
                          .inverse_std = view(in.inverse_std.view({-1})),
                          .sum_grad = view_rows(sum_grad),
                          .row_count = view(in.row_count),
                          .x_grad = view_rows(out.x),
                          .weight_partial = view(weight_partial),
                          .bias_partial = view(bias_partial),
                          .weight_grad = in.needs_weight ? view(out.weight) : TensorView{},
                          .bias_grad = in.needs_bias ? view(out.bias) : TensorView{},
                          .zero_centered = in.zero_centered};
  if (run_on_cuda(x, args)) return out;
  parallel_ranges(chunks, 1, [&](Range range) { run(args, range); });
  parallel_ranges(args.x.sizes[1], 4096, [&](Range cols) { finish(args, cols); });
  return out;
}

// --- inner ops ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& residual,
                                                    const OptionalTensor& weight, double epsilon,
                                                    bool zero_centered,
                                                    const OptionalTensor& row_count) {
  const Outputs out =
      forward(x, {Norm::rms, residual, weight, {}, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.inverse_std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x,
                                                              const OptionalTensor& residual,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              double epsilon, bool zero_centered,
                                                              const OptionalTensor& row_count) {
  const Outputs out =
      forward(x, {Norm::layer, residual, weight, bias, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.mean, out.inverse_std};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& y_grad, const Tensor& x,
                                             const OptionalTensor& weight,
                                             const Tensor& inverse_rms,
                                             const OptionalTensor& sum_grad, bool zero_centered,
                                             const OptionalTensor& row_count, bool needs_weight) {
  const Gradients out = backward(y_grad, x,
                                 {Norm::rms,
                                  {},
                                  inverse_rms,
                                  weight,
                                  {},
                                  sum_grad,
                                  row_count,
                                  zero_centered,
                                  needs_weight,
                                  false});
  return {out.x, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& y_grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& sum_grad,
    bool zero_centered, const OptionalTensor& row_count, bool needs_weight, bool needs_bias) {
  const Gradients out = backward(y_grad, x,
                                 {Norm::layer, mean, inverse_std, weight, bias, sum_grad, row_count,
                                  zero_centered, needs_weight, needs_bias});
  return {out.x, out.weight, out.bias};
}

// Through the dispatcher, so that tracing sees the inner ops.
Outputs call_forward(const Tensor& x, const Inputs& in) {
  if (in.norm == Norm::rms) {
    static const auto op = find_op<decltype(rms_norm_forward)>("redline::rms_norm_forward");
    const auto [y, sum, inverse_rms] =
        op.call(x, in.residual, in.weight, in.epsilon, in.zero_centered, in.row_count);
    return {y, sum, {}, inverse_rms};
  }
  static const auto op = find_op<decltype(layer_norm_forward)>("redline::layer_norm_forward");
  const auto [y, sum, mean, inverse_std] =
      op.call(x, in.residual, in.weight, in.bias, in.epsilon, in.zero_centered, in.row_count);
  return {y, sum, mean, inverse_std};
}

Gradients call_backward(const Tensor& y_grad, const Tensor& x, const BackwardInputs& in) {
  if (in.norm == Norm::rms) {
    static const auto op = find_op<decltype(rms_norm_backward)>("redline::rms_norm_backward");
    const auto [x_grad, weight_grad] = op.call(y_grad, x, in.weight, in.inverse_std, in.sum_grad,
                                               in.zero_centered, in.row_count, in.needs_weight);
    return {x_grad, weight_grad, {}};
  }
  static const auto op = find_op<decltype(layer_norm_backward)>("redline::layer_norm_backward");
  const auto [x_grad, weight_grad, bias_grad] =
      op.call(y_grad, x, in.weight, in.bias, in.mean, in.inverse_std, in.sum_grad, in.zero_centered,
              in.row_count, in.needs_weight, in.needs_bias);
  return {x_grad, weight_grad, bias_grad};
}

// --- derivative ---------------------------------------------------------------------------------

struct NormFunction : public torch::autograd::Function<NormFunction> {
  // Returns {y}, or {y, sum} when there is a residual.
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& row_count,
                               const Inputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Outputs out = call_forward(x, in);
    ctx->save_for_backward({residual ? out.sum : x, value(weight), value(bias), out.mean,
                            out.inverse_std, value(row_count)});
    ctx->saved_data["layer"] = in.norm == Norm::layer;
    ctx->saved_data["zero_centered"] = in.zero_centered;
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->set_materialize_grads(false);
    if (residual) return {out.y, out.sum};
    return {out.y};
  }

  // Inputs of forward in order: x, residual, weight, bias, row_count, in. The graph has edges for
  // the tensors that were given.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const bool has_residual = ctx->saved_data["has_residual"].toBool();
    const auto x_dtype = ctx->saved_data["x_dtype"].toScalarType();
    int64_t edge = has_residual ? 2 : 1;
    const bool needs_weight = weight.defined() && ctx->needs_input_grad(edge);
    edge += weight.defined();
    const bool needs_bias = bias.defined() && ctx->needs_input_grad(edge);
    const Tensor sum_grad = has_residual ? grads[1] : Tensor();
    if (!grads[0].defined()) {  // only the sum was used
      const Tensor x_grad = sum_grad.defined() ? sum_grad.to(x_dtype) : Tensor();
      return {x_grad, sum_grad, Tensor(), Tensor(), Tensor(), Tensor()};
    }
    const Gradients out = call_backward(
        grads[0], x,
        {ctx->saved_data["layer"].toBool() ? Norm::layer : Norm::rms, saved[3], saved[4],
         optional(weight), optional(bias), optional(sum_grad), optional(saved[5]),
         ctx->saved_data["zero_centered"].toBool(), needs_weight, needs_bias});
    return {out.x.to(x_dtype),
            has_residual ? out.x : Tensor(),
            needs_weight ? out.weight : Tensor(),
            needs_bias ? out.bias : Tensor(),
            Tensor(),
            Tensor()};
  }
};

variable_list differentiable(const Tensor& x, const Inputs& in) {
  return NormFunction::apply(x, in.residual, in.weight, in.bias, in.row_count, in);
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

namespace {

// The public ops of one dispatch key: `Run` takes x and Inputs and returns {y} or {y, sum}.
template <variable_list (*Run)(const Tensor&, const Inputs&)>
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
  static void implement(torch::Library& m) {
    m.impl("rms_norm", rms);
    m.impl("layer_norm", layer);
    m.impl("residual_rms_norm", residual_rms);
    m.impl("residual_layer_norm", residual_layer);
  }
};

variable_list without_derivative(const Tensor& x, const Inputs& in) {
  const Outputs out = call_forward(x, in);
  return {out.y, out.sum};
}

// torch runs layer_norm in float32 under CUDA autocast; rms_norm has no rule there.
variable_list in_float32(const Tensor& x, const Inputs& in) {
  const c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const OptionalTensor& tensor) {
    return at::autocast::cached_cast(at::kFloat, tensor, c10::DeviceType::CUDA);
  };
  const Tensor wide = at::autocast::cached_cast(at::kFloat, x, c10::DeviceType::CUDA);
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
  ignore_autocast(m, {"rms_norm", "residual_rms_norm"});
  m.impl("layer_norm", Public<in_float32>::layer);
  m.impl("residual_layer_norm", Public<in_float32>::residual_layer);
}

void implement_inner(torch::Library& m) {
  m.impl("rms_norm_forward", rms_norm_forward);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("layer_norm_forward", layer_norm_forward);
  m.impl("layer_norm_backward", layer_norm_backward);
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
      "rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, float epsilon, "
      "bool zero_centered, Tensor? row_count) -> (Tensor y, Tensor sum, Tensor inverse_rms)");
  m.def(
      "rms_norm_backward(Tensor y_grad, Tensor x, Tensor? weight, Tensor inverse_rms, "
      "Tensor? sum_grad, bool zero_centered, Tensor? row_count, bool needs_weight) "
      "-> (Tensor x_grad, Tensor weight_grad)");
  m.def(
      "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "float epsilon, bool zero_centered, Tensor? row_count) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor inverse_std)");
  m.def(
      "layer_norm_backward(Tensor y_grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor inverse_std, Tensor? sum_grad, bool zero_centered, Tensor? row_count, "
      "bool needs_weight, bool needs_bias) "
      "-> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad)");
}

const Registration registration({
    .public_ops = {"rms_norm", "layer_norm", "residual_rms_norm", "residual_layer_norm"},
    .inner_ops = {"rms_norm_forward", "rms_norm_backward", "layer_norm_forward",
                  "layer_norm_backward"},
    .inner = implement_inner,
    .without_derivative = Public<without_derivative>::implement,
    .differentiable = Public<differentiable>::implement,
    .autocast_cuda = implement_autocast_cuda,
});

}  // namespace redline::ops
