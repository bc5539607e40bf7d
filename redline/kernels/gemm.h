// Matrix products, row-major views of any strides that a BLAS can read:
//   out = f(a b + bias)      or      out += a b
// Accumulated in float32, one rounding at the end (more where ops runs an epilogue behind it, and
// where it is added to a 16-bit out: the library's kernels round the product first). f is
// nothing, gelu (its tanh form; Hendrycks and Gimpel, 2016), or the product with gelu's derivative
// at pre_activation. On CUDA alone, over cuBLASLt: the CPU's products are torch's, called by
// ops/gemm.cpp.
#pragma once

#include <optional>

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

enum class GemmEpilogue { none, gelu, gelu_grad };

// Of rank 2, or all of rank 3 with a leading batch.
struct Gemm {
  TensorView a;                    // [M, K] float32, bfloat16 or float16
  TensorView b;                    // [K, N] a's dtype
  TensorView out;                  // [M, N], out; a's dtype or float32; accumulate reads it too
  TensorView bias = {};            // [N] out's dtype, optional; neither gelu_grad nor accumulate
  TensorView pre_activation = {};  // [M, N] out's dtype; gelu: out, optional; gelu_grad: in
  // [M] out's dtype, out, optional; rank 2 and no other epilogue: the sum of a over K. Where out is
  // a weight's gradient y_grad^T x, this is the bias's.
  TensorView bias_grad = {};
  struct {
    void* data = nullptr;  // 256-byte aligned
    int64_t bytes = 0;     // workspace_bytes() or more
  } workspace = {};
  GemmEpilogue epilogue = GemmEpilogue::none;
  bool accumulate = false;
  bool tf32 = false;  // float32 factors are read with 10 bits of mantissa
};

void check(const Gemm&);

// CUDA. The algorithm is chosen once per shape, dtypes, strides, alignment and device, by the
// library's heuristic: nothing is timed. It adds in one order, but which it is may depend on M.
//
// What run() needs as its workspace; nothing where the library has no algorithm for this epilogue:
// its steps behind the product are a fallback, which a watcher is told.
std::optional<int64_t> workspace_bytes(const Gemm&, Stream);
// False where the algorithm failed before it began: the heuristic's next one stands in its place,
// and may need another workspace. Throws where none is left.
bool run(const Gemm&, Stream);

// How a matrix lies in memory, for whom one of its axes must be adjacent.
struct MatrixLayout {
  bool row_major = true;  // else column-major
  int64_t ld = 1;         // from one row, or column, to the next
};

// Of the last two axes; nothing where neither is adjacent or its lines overlap.
inline std::optional<MatrixLayout> matrix_layout(const TensorView& view) {
  const int64_t rows = view.sizes[view.rank - 2], cols = view.sizes[view.rank - 1];
  const int64_t row = view.strides[view.rank - 2], col = view.strides[view.rank - 1];
  const auto adjacent = [](int64_t count, int64_t stride, int64_t lines, int64_t ld) {
    return (stride == 1 || count <= 1) && (ld >= count || lines <= 1);
  };
  if (adjacent(cols, col, rows, row)) return MatrixLayout{true, rows > 1 ? row : cols};
  if (adjacent(rows, row, cols, col)) return MatrixLayout{false, cols > 1 ? col : rows};
  return std::nullopt;
}

}  // namespace redline
