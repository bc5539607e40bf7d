// What both directions of norm know of a row.
#pragma once

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/row_group.cuh"
#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {
namespace {

// What kernels know of a matrix: where it starts, its row stride, whether it holds float32.
struct Matrix {
  void* data;
  int64_t stride;
  bool is_float32;
};

inline Matrix matrix(const TensorView& view) {
  return {view.data, view.strides[0], view.dtype == DType::float32};
}

// Its address, once: the compiler would rather multiply again for every access to the row. As one
// of global memory, which is what it knows it by.
template <typename S>
__device__ __forceinline__ S* row_at(const Matrix& of, int64_t row) {
  size_t start = __cvta_generic_to_global(static_cast<S*>(of.data) + row * of.stride);
  asm("" : "+l"(start));
  return static_cast<S*>(__cvta_global_to_generic(start));
}

__device__ __forceinline__ MixedRow row_of(const Matrix& from, int64_t row) {
  return {from.data, row * from.stride, from.is_float32};
}

struct Common {
  Matrix x;
  Matrix weight;
  const int64_t* row_count;
  float* mean;
  float* inverse_std;
  int64_t rows;
  int cols;
  float offset;  // 1 when zero_centered
};

// What a kernel is compiled for. T: what x, or in backward y_grad, holds; X: what residual, or in
// backward x, holds.
struct Forward;
struct Backward;

template <typename T_, typename X_, bool Layer_, bool Aligned_>
struct Form {
  using ForwardArgs = Forward;
  using BackwardArgs = Backward;
  using T = T_;
  using X = X_;
  static constexpr bool layer = Layer_, aligned = Aligned_;
  static constexpr bool amax = false;  // forward finds each row's largest magnitude too
};

// Calls visit.operator()<X, layer>() for elements T; X is float32 where `is_wide`, else T.
template <typename T, typename Visit>
void visit_forms(bool is_wide, Norm norm, Visit visit) {
  visit_bool(norm == Norm::layer, [&]<bool Layer>() {
    if constexpr (sizeof(T) == 2) {
      if (is_wide) return visit.template operator()<float, Layer>();
    }
    visit.template operator()<T, Layer>();
  });
}

// Why the launch that follows shares its rows as it does. Lanes: threads of a row within a warp, or
// 0.
inline void note_sharing(int64_t cols, int lanes, int cluster) {
  if (lanes != 0) {
    note_choice("a row of ", cols, " columns fits ", lanes, " threads of a warp");
  } else if (cluster == 1) {
    note_choice("a row of ", cols, " columns fits one block");
  } else {
    note_choice("a row of ", cols, " columns does not fit one block: cluster of ", cluster);
  }
}

inline void note_walk(int64_t cols) {
  note_choice("a row of ", cols, " columns outgrows what blocks hold: read again from L2");
}

template <typename Args>
Common common(const Args& args, const TensorView& x) {
  // A column index may pass the row's end by one block's step.
  REDLINE_CHECK(x.sizes[1] < INT32_MAX - 65536,
                "norm: x: expected rows below 2^31 - 65536 columns");
  return {.x = matrix(x),
          .weight = matrix(args.weight),
          .row_count = args.row_count.template as<const int64_t>(),
          .mean = args.mean.template as<float>(),
          .inverse_std = args.inverse_std.template as<float>(),
          .rows = x.sizes[0],
          .cols = static_cast<int>(x.sizes[1]),
          .offset = args.zero_centered ? 1.0f : 0.0f};
}

__device__ __forceinline__ int64_t counted_rows(const Common& args) {
  if (args.row_count == nullptr) return args.rows;
  return min(max(*args.row_count, int64_t{0}), args.rows);
}

// weight of V vectors, 1 + weight when zero_centered, 1 without one.
template <typename T, int V, bool Aligned>
__device__ __forceinline__ void load_weight(const Common& args, Columns<Aligned> at,
                                            float (&w)[V][vector_size<T>]) {
  if (args.weight.data == nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < vector_size<T>; ++i) w[v][i] = 1.0f;
    }
    return;
  }
  take_vectors<T>(row_of(args.weight, 0), at, w,
                  [&](float& value, float loaded) { value = loaded + args.offset; });
}

template <bool Aligned, typename T>
__device__ __forceinline__ void store_zeros(const Matrix& to, int64_t row, int col,
                                            const Common& args) {
  float zeros[vector_size<T>] = {};
  store_mixed<T>(to.data, to.is_float32, row * to.stride, col, args.cols, Aligned, zeros);
}

}  // namespace
}  // namespace redline::cuda
