#include "redline/ops/norm_run.h"

#include "redline/ops/column_sums.h"
#include "redline/ops/philox.h"
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

void check_inputs(const Tensor& x, const NormInputs& in) {
  const char* op = name(in.norm);
  check_input(in.norm, x);
  check_probability(name(in.norm), in.dropout);
  check_devices(op, x,
                {{"residual", in.residual},
                 {"weight", in.weight},
                 {"bias", in.bias},
                 {"row_count", in.row_count},
                 {"input_bias", in.input_bias}});
  if (!in.residual) return;
  TORCH_CHECK(in.residual->sym_sizes() == x.sym_sizes(), op, ": residual: expected ", x.sym_sizes(),
              ", not ", in.residual->sym_sizes());
}

NormOutputs empty_outputs(const Tensor& x, const NormInputs& in) {
  NormOutputs out;
  out.y = empty_contiguous(x);
  if (in.residual) out.sum = empty_contiguous(*in.residual);
  if (in.norm == Norm::layer) out.mean = empty_statistic(x);
  out.inverse_std = empty_statistic(x);
  if (in.dropout > 0) out.rng_state = at::empty({2}, x.options().dtype(at::kLong));
  if (in.wants_amax) out.amax = empty_statistic(x);
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
  if (!needed || chunks == 0) return {};
  return at::empty({chunks, x.size(-1)}, x.options().dtype(accumulation_type(x)));
}

NormGradients empty_gradients(const Tensor& y_grad, const Tensor& x, const NormBackwardInputs& in) {
  const char* op = name(in.norm);
  NormGradients out;
  out.x = empty_contiguous(x);
  out.weight = empty_gradient(op, "weight", in.weight, in.needs_weight);
  out.bias = empty_gradient(op, "bias", in.bias, in.needs_bias);
  out.input_bias = empty_gradient(op, "input_bias", in.input_bias, in.needs_input_bias);
  if (in.needs_y) out.y = empty_contiguous(x, y_grad.scalar_type());
  if (in.dropout > 0) out.input = empty_contiguous(x, in.input_dtype);
  return out;
}

}  // namespace

NormOutputs run_norm_forward(const Tensor& x, const NormInputs& in) {
  const char* op = name(in.norm);
  check_inputs(x, in);
  const NormOutputs out = empty_outputs(x, in);
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(op, "x", x);
  const OptionalTensor residual = with_rows(op, "residual", in.residual),
                       weight = contiguous(op, "weight", in.weight),
                       bias = contiguous(op, "bias", in.bias),
                       input_bias = contiguous(op, "input_bias", in.input_bias);
  NormForward args{.norm = in.norm,
                   .x = view_rows(x_rows),
                   .residual = view_rows(residual),
                   .weight = view(weight),
                   .bias = view(bias),
                   .y = view_rows(out.y),
                   .sum = in.residual ? view_rows(out.sum) : TensorView{},
                   .mean = view_vector(optional(out.mean)),
                   .inverse_std = view_vector(out.inverse_std),
                   .row_count = view(in.row_count),
                   .quantized = {.values = {},
                                 .scale = {},
                                 .amax = view_vector(optional(out.amax)),
                                 .transposed = {}},
                   .epsilon = in.epsilon,
                   .zero_centered = in.zero_centered,
                   .input_bias = view(input_bias),
                   .rng_state = view(out.rng_state),
                   .probability = in.dropout};
  if (in.dropout > 0) {
    check(args);  // a refused call draws nothing
    args.philox = draw_philox(x);
  }
  run_rows(x, args, args.x.sizes[0], args.x.sizes[1]);
  if (x.is_cpu() && args.x.sizes[0] == 0) run(args, Range{});  // writes rng_state
  return out;
}

NormGradients run_norm_backward(const Tensor& y_grad, const Tensor& x,
                                const NormBackwardInputs& in) {
  const char* op = name(in.norm);
  check_input(in.norm, x);
  check_probability(name(in.norm), in.dropout);
  check_devices(op, x,
                {{"y_grad", y_grad},
                 {"weight", in.weight},
                 {"sum_grad", in.sum_grad},
                 {"rng_state", in.rng_state}});
  const NormGradients out = empty_gradients(y_grad, x, in);
  if (x.is_meta()) return out;
  const Tensor x_rows = with_rows(op, "x", x), y_grad_rows = with_rows(op, "y_grad", y_grad),
               inverse_std = contiguous(op, "inverse_std", in.inverse_std);
  const OptionalTensor weight = contiguous(op, "weight", in.weight),
                       mean = contiguous(op, "mean", optional(in.mean)),
                       sum_grad = with_rows(op, "sum_grad", in.sum_grad),
                       bias = in.needs_y ? contiguous(op, "bias", in.bias) : std::nullopt;
  const int64_t chunks = chunk_count(y_grad, view_rows(y_grad_rows));
  const Tensor weight_partial = partial_sums(x, chunks, in.needs_weight),
               bias_partial = partial_sums(x, chunks, in.needs_bias),
               input_bias_partial =
                   column_partial(out.input_bias, in.needs_input_bias, view_rows(out.x));
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
                          .zero_centered = in.zero_centered,
                          .rng_state = in.dropout > 0 ? view(in.rng_state) : TensorView{},
                          .input_grad = view_rows(out.input),
                          .input_bias_grad = column_sums(input_bias_partial, out.input_bias),
                          .probability = in.dropout};
  if (run_on_cuda(x, args)) return out;
  parallel_ranges(chunks, 1, unit_of_chunks, [&](Range range) { run(args, range); });
  parallel_ranges(args.x.sizes[1], 4096, unit_of_sums, [&](Range cols) { finish(args, cols); });
  return out;
}

Tensor run_norm_rebuild(const Tensor& x, const NormBackwardInputs& in, at::ScalarType dtype) {
  const char* op = name(in.norm);
  check_input(in.norm, x);
  check_devices(op, x, {{"weight", in.weight}, {"bias", in.bias}, {"inverse_std", in.inverse_std}});
  const Tensor y = empty_contiguous(x, dtype);
  if (x.is_meta()) return y;
  const Tensor x_rows = with_rows(op, "x", x),
               inverse_std = contiguous(op, "inverse_std", in.inverse_std);
  const OptionalTensor weight = contiguous(op, "weight", in.weight),
                       bias = contiguous(op, "bias", in.bias),
                       mean = contiguous(op, "mean", optional(in.mean));
  const NormForward args{.norm = in.norm,
                         .x = view_rows(x_rows),
                         .residual = {},
                         .weight = view(weight),
                         .bias = view(bias),
                         .y = view_rows(y),
                         .sum = {},
                         .mean = view_vector(mean),
                         .inverse_std = view_vector(inverse_std),
                         .row_count = {},
                         .quantized = {},
                         .zero_centered = in.zero_centered,
                         .statistics_given = true};
  run_rows(x, args, args.x.sizes[0], args.x.sizes[1]);
  return y;
}

}  // namespace redline::ops
