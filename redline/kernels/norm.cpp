#include "redline/kernels/norm.h"

#include "redline/kernels/column_sums.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/cpu/norm.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

void check_statistic(const char* op, const char* tensor, const TensorView& statistic,
                     const TensorView& x) {
  check_values(op, tensor, statistic, x.sizes[0], accumulation_dtype(x.dtype));
}

}  // namespace

void check(const NormForward& args) {
  const char* op = name(args.norm);
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_rows(op, "x", x, x.sizes[0], x.sizes[1]);
  check_floating(op, "x", x);
  REDLINE_CHECK(args.epsilon >= 0, op, ": epsilon: expected 0 or more, not ", args.epsilon);
  REDLINE_CHECK(!args.statistics_given || !args.residual, op,
                ": residual: expected none beside given statistics");
  if (args.residual) {
    check_rows(op, "residual", args.residual, x.sizes[0], x.sizes[1]);
    check_mixed(op, "residual", args.residual, x.dtype);
    check_matrix(op, "sum", args.sum, x, args.residual.dtype);
  }
  const DType narrow = args.statistics_given ? args.y.dtype : x.dtype;
  check_mixed(op, "x", x, narrow);
  check_parameter(op, "weight", args.weight, x.sizes[1], narrow);
  check_parameter(op, "bias", args.bias, x.sizes[1], narrow);
  check_matrix(op, "y", args.y, x, narrow);
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
  check_mixed(op, "x", x, args.y_grad.dtype);
  check_parameter(op, "weight", args.weight, x.sizes[1], args.y_grad.dtype);
  check_statistic(op, "inverse_std", args.inverse_std, x);
  if (args.norm == Norm::layer) check_statistic(op, "mean", args.mean, x);
  if (args.sum_grad) check_matrix(op, "sum_grad", args.sum_grad, x, x.dtype);
  check_row_count(op, args.row_count);
  check_matrix(op, "x_grad", args.x_grad, x, x.dtype);
  check_parameter(op, "bias", args.bias, x.sizes[1], args.y_grad.dtype);
  if (args.y) {
    check_matrix(op, "y", args.y, x, args.y_grad.dtype);
    REDLINE_CHECK(!args.row_count, op, ": y: expected none beside a row_count");
  }
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
  const int64_t count = partial ? partial.sizes[0] : cpu::column_chunks(rows, args.x.sizes[1]);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    kernels().backward(args, chunk, chunk_rows(rows, count, chunk));
  }
}

void finish(const NormBackward& args, Range cols) { kernels().finish(args, cols); }

}  // namespace redline
