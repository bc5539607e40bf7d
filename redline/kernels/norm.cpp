#include "redline/kernels/norm.h"

#include <algorithm>

#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/cpu/norm.h"

namespace redline {
namespace {

const char* name(Norm norm) { return norm == Norm::rms ? "rms_norm" : "layer_norm"; }

// x's dtype, or float32 beside a 16-bit x.
void check_mixed(const char* op, const char* tensor, const TensorView& view, const TensorView& x) {
  const DType wide = accumulation_dtype(x.dtype);
  REDLINE_CHECK(view.dtype == x.dtype || view.dtype == wide, op, ": ", tensor, ": expected ",
                x.dtype, x.dtype == wide ? "" : " or float32", ", not ", view.dtype);
}

void check_parameter(const char* op, const char* tensor, const TensorView& parameter,
                     const TensorView& x) {
  if (!parameter) return;
  check_vector(op, tensor, parameter, x.sizes[1]);
  check_mixed(op, tensor, parameter, x);
}

void check_statistic(const char* op, const char* tensor, const TensorView& statistic,
                     const TensorView& x) {
  check_vector(op, tensor, statistic, x.sizes[0]);
  REDLINE_CHECK(statistic.dtype == accumulation_dtype(x.dtype), op, ": ", tensor, ": expected ",
                accumulation_dtype(x.dtype), ", not ", statistic.dtype);
}

void check_like_x(const char* op, const char* tensor, const TensorView& view, const TensorView& x) {
  check_rows(op, tensor, view, x.sizes[0], x.sizes[1]);
  REDLINE_CHECK(view.dtype == x.dtype, op, ": ", tensor, ": expected ", x.dtype, ", not ",
                view.dtype);
}

void check_row_count(const char* op, const TensorView& row_count) {
  if (!row_count) return;
  REDLINE_CHECK(row_count.numel() == 1 && row_count.dtype == DType::int64, op,
                ": row_count: expected one int64, not ", row_count);
}

}  // namespace

void check(const NormForward& args) {
  const char* op = name(args.norm);
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_rows(op, "x", x, x.sizes[0], x.sizes[1]);
  REDLINE_CHECK(is_floating(x.dtype), op, ": x: expected a floating dtype, not ", x.dtype);
  REDLINE_CHECK(args.epsilon >= 0, op, ": epsilon: expected 0 or more, not ", args.epsilon);
  if (args.residual) {
    check_rows(op, "residual", args.residual, x.sizes[0], x.sizes[1]);
    check_mixed(op, "residual", args.residual, x);
    check_rows(op, "sum", args.sum, x.sizes[0], x.sizes[1]);
    REDLINE_CHECK(args.sum.dtype == args.residual.dtype, op, ": sum: expected ",
                  args.residual.dtype, ", not ", args.sum.dtype);
  }
  check_parameter(op, "weight", args.weight, x);
  check_parameter(op, "bias", args.bias, x);
  check_like_x(op, "y", args.y, x);
  check_statistic(op, "inverse_std", args.inverse_std, x);
  if (args.norm == Norm::layer) check_statistic(op, "mean", args.mean, x);
  check_row_count(op, args.row_count);
  check_not_quantized(op, args.quantized);
}

void check(const NormBackward& args) {
  const char* op = name(args.norm);
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_rows(op, "x", x, x.sizes[0], x.sizes[1]);
  check_rows(op, "y_grad", args.y_grad, x.sizes[0], x.sizes[1]);
  check_mixed(op, "x", x, args.y_grad);
  check_parameter(op, "weight", args.weight, args.y_grad);
  check_statistic(op, "inverse_std", args.inverse_std, x);
  if (args.norm == Norm::layer) check_statistic(op, "mean", args.mean, x);
  if (args.sum_grad) check_like_x(op, "sum_grad", args.sum_grad, x);
  check_row_count(op, args.row_count);
  check_like_x(op, "x_grad", args.x_grad, x);
  if (args.weight_grad) check_vector(op, "weight_grad", args.weight_grad, x.sizes[1]);
  if (args.bias_grad) check_vector(op, "bias_grad", args.bias_grad, x.sizes[1]);
}

namespace {
const cpu::NormKernels& kernels() {
  return cpu::choose(cpu::baseline::norm_kernels, cpu::avx2::norm_kernels,
                     cpu::avx512::norm_kernels);
}
}  // namespace

void run(const NormForward& args, Range rows) { kernels().forward(args, rows); }

void run(const NormBackward& args, Range chunks) {
  const int64_t rows = args.x.sizes[0];
  const TensorView& partial = args.weight_partial ? args.weight_partial : args.bias_partial;
  const int64_t count = partial ? partial.sizes[0] : cpu::norm_chunks(rows, args.x.sizes[1]);
  const int64_t rows_per_chunk = (rows + count - 1) / count;
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t begin = std::min(rows, chunk * rows_per_chunk);
    kernels().backward(args, chunk, {begin, std::min(rows, begin + rows_per_chunk)});
  }
}

void finish(const NormBackward& args, Range cols) { kernels().finish(args, cols); }

// 16 chunks keep the partial sums small beside x; 64 rows keep the last, serial sum short.
int64_t cpu::norm_chunks(int64_t rows, int64_t) { return std::clamp<int64_t>(rows / 64, 1, 16); }

}  // namespace redline
