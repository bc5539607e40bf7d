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

// The parameters are what is fixed: a width that none of them has is x's fault.
void check_width(const char* op, const NormForward& args) {
  const TensorView &x = args.x, &weight = args.weight, &bias = args.bias;
  if (weight.rank != 1 || (bias.rank == 1 && bias.sizes[0] != weight.sizes[0])) return;
  REDLINE_CHECK(weight.sizes[0] == x.sizes[1], op, ": x: expected a last dimension of ",
                weight.sizes[0], ", not ", x.sizes[1]);
}

void check_amax(const char* op, const NormForward& args) {
  check_no_values(op, args.quantized);
  if (!args.quantized.amax) return;
  check_statistic(op, "amax", args.quantized.amax, args.x);
  REDLINE_CHECK(!args.input_bias && !args.rng_state && !args.statistics_given, op,
                ": amax: expected none beside dropout, an input_bias or given statistics");
}

void check_dropout(const char* op, const NormForward& args) {
  if (!args.input_bias && !args.rng_state) return;
  REDLINE_CHECK(args.residual, op, ": residual: expected one beside dropout or an input_bias");
  REDLINE_CHECK(!args.row_count, op, ": row_count: expected none beside dropout or an input_bias");
  check_parameter(op, "input_bias", args.input_bias, args.x.sizes[1], args.x.dtype);
  check_random(op, args.probability, args.rng_state);
}

void check_dropout(const char* op, const NormBackward& args) {
  const int64_t cols = args.x.sizes[1];
  check_column_sums(op, "input_bias_grad", args.input_bias_grad, cols,
                    accumulation_dtype(args.x.dtype));
  check_random(op, args.probability, args.rng_state);
  REDLINE_CHECK(args.input_grad.present == args.rng_state.present, op,
                ": input_grad: expected one beside an rng_state, and none without");
  if (args.input_grad) {
    const DType dtype = args.input_grad.dtype;
    REDLINE_CHECK(dtype == args.y_grad.dtype || dtype == args.x.dtype, op,
                  ": input_grad: expected ", args.y_grad.dtype, " as y_grad has or ", args.x.dtype,
                  " as x has, not ", dtype);
    check_matrix(op, "input_grad", args.input_grad, args.x, dtype);
  }
  REDLINE_CHECK(!args.row_count || (!args.input_grad && !args.input_bias_grad.total), op,
                ": row_count: expected none beside dropout or an input_bias");
}

}  // namespace

BiasDropoutAddForward input_sum(const NormForward& args) {
  return {.x = args.x,
          .bias = args.input_bias,
          .residual = args.residual,
          .y = args.sum,
          .rng_state = args.rng_state,
          .philox = args.philox,
          .probability = args.probability};
}

BiasDropoutAddBackward input_gradient(const NormBackward& args) {
  return {.y_grad = args.x_grad,
          .rng_state = args.rng_state,
          .x_grad = args.input_grad,
          .bias_grad = args.input_bias_grad,
          .probability = args.probability};
}

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
  check_width(op, args);
  check_parameter(op, "weight", args.weight, x.sizes[1], narrow);
  check_parameter(op, "bias", args.bias, x.sizes[1], narrow);
  check_matrix(op, "y", args.y, x, narrow);
  check_statistic(op, "inverse_std", args.inverse_std, x);
  if (args.norm == Norm::layer) check_statistic(op, "mean", args.mean, x);
  check_row_count(op, args.row_count);
  check_amax(op, args);
  check_dropout(op, args);
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
  check_dropout(op, args);
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
  const TensorView& partial = args.weight_partial ? args.weight_partial
                              : args.bias_partial ? args.bias_partial
                                                  : args.input_bias_grad.partial;
  const int64_t count = partial ? partial.sizes[0] : cpu::column_chunks(rows, args.x.sizes[1]);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    kernels().backward(args, chunk, chunk_rows(rows, count, chunk));
  }
}

void finish(const NormBackward& args, Range cols) { kernels().finish(args, cols); }

}  // namespace redline
