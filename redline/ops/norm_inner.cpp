#include "redline/ops/norm_inner.h"

#include "redline/kernels/column_sums.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One statistic per row: the leading sizes of x, kept symbolic.
Tensor empty_statistic(const Tensor& x) {
  return at::empty_symint(x.sym_sizes().slice(0, x.dim() - 1),
                          x.options().dtype(accumulation_type(x)));
}

void check_input(Norm norm, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, name(norm), ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), name(norm),
              ": x: expected a floating dtype, not ", x.scalar_type());
}

NormOutputs forward(const Tensor& x, const NormInputs& in) {
  const char* op = name(in.norm);
  check_input(in.norm, x);
  check_devices(op, x,
                {{"residual", in.residual},
                 {"weight", in.weight},
                 {"bias", in.bias},
                 {"row_count", in.row_count}});
  if (in.residual) {
    TORCH_CHECK(in.residual->sym_sizes() == x.sym_sizes(), op, ": residual: expected ",
                x.sym_sizes(), ", not ", in.residual->sym_sizes());
  }
  NormOutputs out;
  out.y = empty_contiguous(x);
  out.sum = in.residual ? empty_contiguous(*in.residual) : Tensor();
  out.mean = in.norm == Norm::layer ? empty_statistic(x) : Tensor();
  out.inverse_std = empty_statistic(x);
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(op, "x", x);
  const OptionalTensor residual = with_rows(op, "residual", in.residual),
                       weight = contiguous(op, "weight", in.weight),
                       bias = contiguous(op, "bias", in.bias);
  const NormForward args{.norm = in.norm,
                         .x = view_rows(x_rows),
                         .residual = view_rows(residual),
                         .weight = view(weight),
                         .bias = view(bias),
                         .y = view_rows(out.y),
                         .sum = in.residual ? view_rows(out.sum) : TensorView{},
                         .mean = view_vector(optional(out.mean)),
                         .inverse_std = view_vector(out.inverse_std),
                         .row_count = view(in.row_count),
                         .quantized = {},
                         .epsilon = in.epsilon,
                         .zero_centered = in.zero_centered};
  run_rows(x, args, args.x.sizes[0], args.x.sizes[1]);
  return out;
}

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

NormGradients backward(const Tensor& y_grad, const Tensor& x, const NormBackwardInputs& in) {
  const char* op = name(in.norm);
  check_input(in.norm, x);
  check_devices(op, x, {{"y_grad", y_grad}, {"weight", in.weight}, {"sum_grad", in.sum_grad}});
  NormGradients out;
  out.x = empty_contiguous(x);
  out.weight = empty_gradient(op, "weight", in.weight, in.needs_weight);
  out.bias = empty_gradient(op, "bias", in.bias, in.needs_bias);
  if (in.needs_y) {
    out.y = empty_contiguous(x, y_grad.scalar_type());
  }
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(op, "x", x), y_grad_rows = with_rows(op, "y_grad", y_grad),
               inverse_std = contiguous(op, "inverse_std", in.inverse_std);
  const OptionalTensor weight = contiguous(op, "weight", in.weight),
                       mean = contiguous(op, "mean", optional(in.mean)),
                       sum_grad = with_rows(op, "sum_grad", in.sum_grad),
                       bias = in.needs_y ? contiguous(op, "bias", in.bias) : std::nullopt;
  const int64_t chunks = chunk_count(y_grad, view_rows(y_grad_rows));
  const Tensor weight_partial = partial_sums(x, chunks, in.needs_weight);
  const Tensor bias_partial = partial_sums(x, chunks, in.needs_bias);
  const NormBackward args{.norm = in.norm,
                          .y_grad = view_rows(y_grad_rows),
                          .x = view_rows(x_rows),
                          .weight = view(weight),
                          .mean = view_vector(mean),
                          .inverse_std = view_vector(inverse_std),
                          .sum_grad = view_rows(sum_grad),
                          .row_count = view(in.row_count),
                          .x_grad = view_rows(out.x),
                          .bias = view(bias),
                          .y = view_rows(out.y),
                          .weight_partial = view(weight_partial),
                          .bias_partial = view(bias_partial),
                          .weight_grad = in.needs_weight ? view(out.weight) : TensorView{},
                          .bias_grad = in.needs_bias ? view(out.bias) : TensorView{},
                          .zero_centered = in.zero_centered};
  if (run_on_cuda(x, args)) return out;
  parallel_ranges(chunks, 1, unit_of_chunks, [&](Range range) { run(args, range); });
  parallel_ranges(args.x.sizes[1], 4096, unit_of_sums, [&](Range cols) { finish(args, cols); });
  return out;
}

// --- inner ops ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& residual,
                                                    const OptionalTensor& weight, double epsilon,
                                                    bool zero_centered,
                                                    const OptionalTensor& row_count) {
  const NormOutputs out =
      forward(x, {Norm::rms, residual, weight, {}, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.inverse_std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x,
                                                              const OptionalTensor& residual,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              double epsilon, bool zero_centered,
                                                              const OptionalTensor& row_count) {
  const NormOutputs out =
      forward(x, {Norm::layer, residual, weight, bias, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.mean, out.inverse_std};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& y_grad, const Tensor& x,
                                             const OptionalTensor& weight,
                                             const Tensor& inverse_rms,
                                             const OptionalTensor& sum_grad, bool zero_centered,
                                             const OptionalTensor& row_count, bool needs_weight) {
  const NormGradients out = backward(y_grad, x,
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
  const NormGradients out = backward(y_grad, x,
                                     {Norm::layer, mean, inverse_std, weight, bias, sum_grad,
                                      row_count, zero_centered, needs_weight, needs_bias});
  return {out.x, out.weight, out.bias};
}

// Of either norm, by the mean. The first three as the norms' own backward gives them.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward_rebuild(
    const Tensor& y_grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mean, const Tensor& inverse_std, const OptionalTensor& sum_grad,
    bool zero_centered, bool needs_weight, bool needs_bias) {
  const NormGradients out = backward(y_grad, x,
                                     {mean ? Norm::layer : Norm::rms,
                                      value(mean),
                                      inverse_std,
                                      weight,
                                      bias,
                                      sum_grad,
                                      {},
                                      zero_centered,
                                      needs_weight,
                                      needs_bias,
                                      true});
  return {out.x, out.weight, out.bias, out.y};
}

Tensor rebuild(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
               const OptionalTensor& mean, const Tensor& inverse_std, bool zero_centered,
               at::ScalarType dtype) {
  const Norm norm = mean ? Norm::layer : Norm::rms;
  check_input(norm, x);
  check_devices(name(norm), x, {{"weight", weight}, {"bias", bias}, {"inverse_std", inverse_std}});
  const Tensor y = empty_contiguous(x, dtype);
  if (x.is_meta()) return y;
  const char* op = name(norm);
  const Tensor x_rows = with_rows(op, "x", x),
               rows_inverse_std = contiguous(op, "inverse_std", inverse_std);
  const OptionalTensor weight_vector = contiguous(op, "weight", weight),
                       bias_vector = contiguous(op, "bias", bias),
                       rows_mean = contiguous(op, "mean", mean);
  const NormForward args{.norm = norm,
                         .x = view_rows(x_rows),
                         .residual = {},
                         .weight = view(weight_vector),
                         .bias = view(bias_vector),
                         .y = view_rows(y),
                         .sum = {},
                         .mean = view_vector(rows_mean),
                         .inverse_std = view_vector(rows_inverse_std),
                         .row_count = {},
                         .quantized = {},
                         .zero_centered = zero_centered,
                         .statistics_given = true};
  run_rows(x, args, args.x.sizes[0], args.x.sizes[1]);
  return y;
}

void implement(torch::Library& m) {
  m.impl("rms_norm_forward", rms_norm_forward);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("layer_norm_forward", layer_norm_forward);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("norm_rebuild", rebuild);
  m.impl("norm_backward_rebuild", norm_backward_rebuild);
}

}  // namespace

NormOutputs norm_forward(const Tensor& x, const NormInputs& in) {
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

NormGradients norm_backward(const Tensor& y_grad, const Tensor& x, const NormBackwardInputs& in) {
  if (in.needs_y) {
    static const auto op =
        find_op<decltype(norm_backward_rebuild)>("redline::norm_backward_rebuild");
    const auto [x_grad, weight_grad, bias_grad, y] =
        op.call(y_grad, x, in.weight, in.bias, optional(in.mean), in.inverse_std, in.sum_grad,
                in.zero_centered, in.needs_weight, in.needs_bias);
    return {x_grad, weight_grad, bias_grad, y};
  }
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

Tensor norm_rebuild(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                    const NormOutputs& statistics, bool zero_centered, at::ScalarType dtype) {
  static const auto op = find_op<decltype(rebuild)>("redline::norm_rebuild");
  return op.call(x, weight, bias, optional(statistics.mean), statistics.inverse_std, zero_centered,
                 dtype);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "norm_rebuild(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor inverse_std, "
      "bool zero_centered, ScalarType dtype) -> Tensor");
  m.def(
      "norm_backward_rebuild(Tensor y_grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, "
      "Tensor inverse_std, Tensor? sum_grad, bool zero_centered, bool needs_weight, "
      "bool needs_bias) -> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad, Tensor y)");
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
    .inner_ops = {"rms_norm_forward", "rms_norm_backward", "layer_norm_forward",
                  "layer_norm_backward", "norm_rebuild", "norm_backward_rebuild"},
    .inner = implement,
});

}  // namespace redline::ops
