// A product as a column-major library sees it: D[m, n] = op(A)[m, k] op(B)[k, n]. A function of the
// arguments alone, without the library: tests/cpp holds it to a product by hand.
//
// Memory that is row-major is the transpose, column-major: a row-major out is D = out^T = b^T a^T,
// so that A is b and B is a; a column-major out is D itself. Either way a factor that lies as out
// does is taken as it is, and one that lies the other way is transposed.
#pragma once

#include <optional>
#include <type_traits>

#include "redline/core/watch.h"
#include "redline/kernels/gemm.h"

namespace redline::cuda {

// check() has seen that there is one.
inline MatrixLayout layout_of(const TensorView& view) {
  return matrix_layout(view).value_or(MatrixLayout{});
}

// All that an algorithm is chosen by: the key of its plan. Every bit of it is compared.
struct GemmProblem {
  enum BiasGrad : int32_t { none, of_a, of_b };

  int64_t m = 0, n = 0, k = 0, batch = 1;
  int64_t lda = 0, ldb = 0, ldd = 0, ld_pre = 0;
  int64_t stride_a = 0, stride_b = 0, stride_d = 0, stride_pre = 0;
  int32_t device = 0, sm_target = 0;  // sm_target 0: all
  int32_t swapped = 0;                // A is b
  int32_t transpose_a = 0, transpose_b = 0;
  int32_t factors = 0, out = 0;  // DType
  int32_t epilogue = 0;          // GemmEpilogue
  int32_t has_bias = 0, has_pre = 0, bias_grad = none;
  int32_t accumulate = 0, tf32 = 0;
  // Bytes, 16 at most: the widest access. More is not told apart, so that two tensors of torch's
  // allocator, a slice of one perhaps, get one plan and the same bits.
  int32_t align_a = 0, align_b = 0, align_d = 0, align_vector = 0, align_pre = 0;
};
static_assert(std::has_unique_object_representations_v<GemmProblem>);

// Of every matrix of a batch.
inline int32_t alignment(const TensorView& view) {
  const int64_t step = view.rank == 3 ? view.strides[0] * element_bytes(view.dtype) : 0;
  const auto address = reinterpret_cast<uintptr_t>(view.data) | static_cast<uintptr_t>(step) | 16;
  return static_cast<int32_t>(address & (~address + 1));
}

// What the library's epilogues cannot say, and how they could.
struct Unfit {
  Fallback fallback;
  const char* why;
};

// Nothing where they can. A gelu that is rounded to float32 is not the library's, whose tanh is not
// that exact (H100: an L2 error of 3.8e-6).
inline std::optional<Unfit> unfit_epilogue(const Gemm& args) {
  const auto unfit = [](const char* tensor, const char* why, const char* instead) {
    return Unfit{{"gemm", tensor, instead}, why};
  };
  const bool row_major = layout_of(args.out).row_major;
  if (args.epilogue != GemmEpilogue::none && args.out.dtype == DType::float32) {
    return unfit("out", "the library's gelu is not exact enough for float32", "use a 16-bit dtype");
  }
  if (args.bias && !row_major) {
    return unfit("bias", "it runs along the columns of an out that is column-major",
                 "give out contiguous");
  }
  if (!args.pre_activation) return std::nullopt;
  const MatrixLayout pre = layout_of(args.pre_activation);
  if (pre.row_major != row_major) {
    return unfit("pre_activation", "it lies otherwise than out", "give both contiguous");
  }
  const bool batched = args.out.rank == 3;
  if (pre.ld % 8 != 0 || (batched && args.pre_activation.strides[0] % 8 != 0)) {
    return unfit("pre_activation", "its lines are no multiple of 8 elements",
                 "pad them to a multiple of 8");
  }
  if (alignment(args.pre_activation) < 16) {
    return unfit("pre_activation", "its address is no multiple of 16 bytes",
                 "give a tensor with an address of its own, such as a clone");
  }
  return std::nullopt;
}

// Nothing where the epilogue is unfit.
inline std::optional<GemmProblem> problem_of(const Gemm& args, Stream stream) {
  const MatrixLayout out = layout_of(args.out), a = layout_of(args.a), b = layout_of(args.b);
  const int last = args.out.rank - 1;
  const bool batched = args.out.rank == 3;
  const auto stride = [batched](const TensorView& view) { return batched ? view.strides[0] : 0; };
  if (unfit_epilogue(args)) return std::nullopt;
  GemmProblem p;
  p.swapped = out.row_major;
  const TensorView &left = p.swapped ? args.b : args.a, &right = p.swapped ? args.a : args.b;
  const MatrixLayout &left_layout = p.swapped ? b : a, &right_layout = p.swapped ? a : b;
  p.m = args.out.sizes[p.swapped ? last : last - 1];
  p.n = args.out.sizes[p.swapped ? last - 1 : last];
  p.k = args.a.sizes[last];
  p.batch = batched ? args.out.sizes[0] : 1;
  p.lda = left_layout.ld, p.ldb = right_layout.ld, p.ldd = out.ld;
  p.stride_a = stride(left), p.stride_b = stride(right), p.stride_d = stride(args.out);
  p.transpose_a = left_layout.row_major != out.row_major;
  p.transpose_b = right_layout.row_major != out.row_major;
  p.align_a = alignment(left), p.align_b = alignment(right), p.align_d = alignment(args.out);
  p.device = stream.device;
  p.sm_target = stream.sm_margin > 0 ? stream.usable_sms() : 0;
  p.factors = static_cast<int32_t>(args.a.dtype);
  p.out = static_cast<int32_t>(args.out.dtype);
  p.epilogue = static_cast<int32_t>(args.epilogue);
  p.accumulate = args.accumulate;
  p.tf32 = args.tf32 && args.a.dtype == DType::float32;
  if (args.bias) {
    p.has_bias = 1;
    p.align_vector = alignment(args.bias);
  }
  if (args.bias_grad) {
    p.bias_grad = p.swapped ? GemmProblem::of_b : GemmProblem::of_a;
    p.align_vector = alignment(args.bias_grad);
  }
  if (args.pre_activation) {
    const MatrixLayout pre = layout_of(args.pre_activation);
    p.has_pre = 1;
    p.ld_pre = pre.ld, p.stride_pre = stride(args.pre_activation);
    p.align_pre = alignment(args.pre_activation);
  }
  return p;
}

}  // namespace redline::cuda
