#include "redline/kernels/activation.h"

#include <optional>
#include <string_view>

#include "redline/kernels/cpu/activation.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "activation";

const cpu::ActivationKernels& kernels() {
  return cpu::choose(cpu::baseline::activation_kernels, cpu::avx2::activation_kernels,
                     cpu::avx512::activation_kernels);
}

std::optional<Activation> named(std::string_view kind) {
  if (kind == "gelu") return Activation::gelu;
  if (kind == "gelu_erf") return Activation::gelu_erf;
  if (kind == "quick_gelu") return Activation::quick_gelu;
  if (kind == "silu") return Activation::silu;
  if (kind == "relu") return Activation::relu;
  if (kind == "squared_relu") return Activation::squared_relu;
  return std::nullopt;
}

}  // namespace

bool is_activation(std::string_view kind) { return named(kind).has_value(); }

Activation activation_from(std::string_view kind) {
  const std::optional<Activation> found = named(kind);
  REDLINE_CHECK(found, op, ": kind: expected one of ", activation_kinds, ", not ", kind);
  return *found;
}

void check(const ActivationForward& args) {
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_matrix(op, "x", x, x, x.dtype);
  check_floating(op, "x", x);
  check_parameter(op, "bias", args.bias, x.sizes[1], x.dtype);
  check_matrix(op, "y", args.y, x, x.dtype);
  check_not_quantized(op, args.quantized);
}

void check(const ActivationBackward& args) {
  const TensorView& x = args.x;
  REDLINE_CHECK(x.rank == 2, op, ": x: expected [rows, cols], not ", x);
  check_floating(op, "x", x);
  check_matrix(op, "x", x, x, x.dtype);
  check_matrix(op, "y_grad", args.y_grad, x, x.dtype);
  check_parameter(op, "bias", args.bias, x.sizes[1], x.dtype);
  check_matrix(op, "x_grad", args.x_grad, x, x.dtype);
  if (args.y) check_matrix(op, "y", args.y, x, x.dtype);
  check_column_sums(op, "bias_grad", args.bias_grad, x.sizes[1], accumulation_dtype(x.dtype));
}

void run(const ActivationForward& args, Range elements) { kernels().forward(args, elements); }

void run(const ActivationBackward& args, Range range) {
  if (!args.bias_grad.total) {
    kernels().backward(args, 0, range);
    return;
  }
  const int64_t cols = args.x.sizes[1];
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const Range rows = chunk_rows(args.x.sizes[0], args.bias_grad.partial.sizes[0], chunk);
    kernels().backward(args, chunk, {rows.begin * cols, rows.end * cols});
  }
}

void finish(const ActivationBackward& args, Range cols) { kernels().finish(args, cols); }

}  // namespace redline
