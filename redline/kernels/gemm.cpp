#include "redline/kernels/gemm.h"

#include <limits>

namespace redline {
namespace {

constexpr const char* op = "gemm";

bool is_factor(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

// Sizes, what lies beside what, and that the library's 32-bit sizes hold them.
void check_matrix(const char* name, const TensorView& view, int64_t rows, int64_t cols,
                  const TensorView& like) {
  const int axes = view.rank;
  REDLINE_CHECK(view.present && axes == like.rank &&
                    (axes == 2 || view.sizes[0] == like.sizes[0]) && view.sizes[axes - 2] == rows &&
                    view.sizes[axes - 1] == cols,
                op, ": ", name, ": expected [", like.rank == 3 ? "batch, " : "", rows, ", ", cols,
                "] beside ", like, ", not ", view);
  REDLINE_CHECK(matrix_layout(view).has_value(), op, ": ", name,
                ": expected adjacent rows or columns, not strides of ", view.strides[axes - 2],
                " and ", view.strides[axes - 1]);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  REDLINE_CHECK(rows <= most && cols <= most && (axes == 2 || view.sizes[0] <= most), op, ": ",
                name, ": expected at most ", most, " matrices, rows and columns, not ", view);
}

void check_like_out(const char* name, const TensorView& view, const TensorView& out,
                    int64_t count) {
  check_vector(op, name, view, count);
  REDLINE_CHECK(view.dtype == out.dtype, op, ": ", name, ": expected ", out.dtype,
                " as out has, not ", view.dtype);
}

void check_epilogue(const Gemm& args) {
  const TensorView &out = args.out, &pre = args.pre_activation;
  const bool backward = args.epilogue == GemmEpilogue::gelu_grad;
  REDLINE_CHECK(!args.accumulate || (args.epilogue == GemmEpilogue::none && !args.bias), op,
                ": accumulate: expected no bias and no activation beside it");
  REDLINE_CHECK(!backward || !args.bias, op, ": bias: expected none with gelu_grad");
  REDLINE_CHECK(args.epilogue != GemmEpilogue::none || !pre, op,
                ": pre_activation: expected none without gelu or gelu_grad");
  REDLINE_CHECK(!backward || pre, op, ": pre_activation: expected one with gelu_grad");
  const int64_t rows = out.sizes[out.rank - 2], cols = out.sizes[out.rank - 1];
  if (args.bias) check_like_out("bias", args.bias, out, cols);
  if (pre) {
    check_matrix("pre_activation", pre, rows, cols, out);
    REDLINE_CHECK(pre.dtype == out.dtype, op, ": pre_activation: expected ", out.dtype,
                  " as out has, not ", pre.dtype);
  }
  if (args.bias_grad) {
    REDLINE_CHECK(out.rank == 2 && args.epilogue == GemmEpilogue::none && !args.bias, op,
                  ": bias_grad: expected neither a batch, a bias nor an activation beside it");
    check_like_out("bias_grad", args.bias_grad, out, rows);
  }
}

}  // namespace

void check(const Gemm& args) {
  const TensorView &a = args.a, &b = args.b, &out = args.out;
  REDLINE_CHECK(a.present && (a.rank == 2 || a.rank == 3), op,
                ": a: expected [M, K] or [batch, M, K], not ", a);
  REDLINE_CHECK(b.present && b.rank == a.rank, op, ": b: expected a rank of ", a.rank,
                " as a has, not ", b);
  REDLINE_CHECK(is_factor(a.dtype), op, ": a: expected float32, bfloat16 or float16, not ",
                a.dtype);
  REDLINE_CHECK(b.dtype == a.dtype, op, ": b: expected ", a.dtype, " as a has, not ", b.dtype);
  const int64_t m = a.sizes[a.rank - 2], k = a.sizes[a.rank - 1], n = b.sizes[b.rank - 1];
  check_matrix("a", a, m, k, a);
  check_matrix("b", b, k, n, a);
  check_matrix("out", out, m, n, a);
  REDLINE_CHECK(out.rank == 2 || out.sizes[0] <= 1 || out.strides[0] != 0, op,
                ": out: expected a matrix of its own for each of the batch, not a stride of 0");
  REDLINE_CHECK(out.dtype == a.dtype || out.dtype == DType::float32, op, ": out: expected ",
                a.dtype, " or float32, not ", out.dtype);
  check_epilogue(args);
}

}  // namespace redline
