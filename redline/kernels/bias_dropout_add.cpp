#include "redline/kernels/bias_dropout_add.h"

#include "redline/kernels/cpu/bias_dropout_add.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "bias_dropout_add";

const cpu::BiasDropoutAddKernels& kernels() {
  return cpu::choose(cpu::baseline::bias_dropout_add_kernels, cpu::avx2::bias_dropout_add_kernels,
                     cpu::avx512::bias_dropout_add_kernels);
}

}  // namespace

void check(const BiasDropoutAddForward& args) {
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_floating(op, "x", x);
  check_matrix(op, "x", x, x, x.dtype);
  check_parameter(op, "bias", args.bias, x.sizes[1], x.dtype);
  check_mixed(op, "residual", args.residual, x.dtype);
  check_matrix(op, "residual", args.residual, x, args.residual.dtype);
  check_matrix(op, "y", args.y, x, args.residual.dtype);
  check_random(op, args.probability, args.rng_state);
}

void check(const BiasDropoutAddBackward& args) {
  const TensorView& x_grad = args.x_grad;
  REDLINE_CHECK(x_grad.rank == 2, op, ": x_grad: expected [rows, cols], not ", x_grad);
  check_floating(op, "x_grad", x_grad);
  check_matrix(op, "x_grad", x_grad, x_grad, x_grad.dtype);
  check_mixed(op, "y_grad", args.y_grad, x_grad.dtype);
  check_matrix(op, "y_grad", args.y_grad, x_grad, args.y_grad.dtype);
  check_column_sums(op, "bias_grad", args.bias_grad, x_grad.sizes[1],
                    accumulation_dtype(x_grad.dtype));
  check_random(op, args.probability, args.rng_state);
}

void run(const BiasDropoutAddForward& args, Range elements) { kernels().forward(args, elements); }

void run(const BiasDropoutAddBackward& args, Range range) {
  if (!args.bias_grad.total) {
    kernels().backward(args, 0, range);
    return;
  }
  const int64_t cols = args.x_grad.sizes[1];
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const Range rows = chunk_rows(args.x_grad.sizes[0], args.bias_grad.partial.sizes[0], chunk);
    kernels().backward(args, chunk, {rows.begin * cols, rows.end * cols});
  }
}

void finish(const BiasDropoutAddBackward& args, Range cols) { kernels().finish(args, cols); }

}  // namespace redline
