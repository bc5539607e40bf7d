// Over budget: template parameters: all but the first two are deduced.
// Over budget: parameters: a row's parts, each in registers; a struct of them would name nothing.
//
// The largest magnitude of each row of y, made while the row is in registers: what quantisation by
// row or, of all rows, by tensor scales with. Magnitudes order as their bits do, NaN above all, so
// whole numbers are compared, in any order with the same result.
#pragma once

#include "redline/kernels/cuda/device/row_group.cuh"
#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline::cuda {
namespace {

// A thread's part of a row; nothing where it is not wanted.
template <bool Wanted>
struct RowAmax {
  template <int N, bool Aligned>
  __device__ __forceinline__ void add(const float (&)[N], Columns<Aligned>) {}
};

template <>
struct RowAmax<true> {
  float largest = 0.0f;

  // Of one vector: NaN stays.
  template <int N, bool Aligned>
  __device__ __forceinline__ void add(const float (&y)[N], Columns<Aligned> at) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!Aligned && at.col + i >= at.cols) break;
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(y[i])));
    }
  }

  // Over the threads of a warp that share the row.
  template <int Lanes>
  __device__ __forceinline__ uint32_t of_warp() const {
    return __reduce_max_sync(lane_mask<Lanes>(), __float_as_uint(largest));
  }
};

// Rounded as y is: rounding keeps the order.
template <typename T>
__device__ __forceinline__ void store_amax(const Forward& args, int64_t row, uint32_t largest) {
  const float exact[1] = {__uint_as_float(largest)};
  args.amax[row] = element(pack<T>(exact), 0);
}

// Of the rows first_row, first_row + Tile::groups, ... `shared` holds a value for each, 0 before
// the row's statistics were found; not used within a warp.
template <typename Form, typename Tile, typename Group, int R, bool Aligned>
__device__ __forceinline__ void store_amaxes(const Forward& args, const Group& group,
                                             int64_t first_row, Columns<Aligned> at,
                                             const RowAmax<true> (&found)[R], uint32_t* shared) {
  using T = typename Form::T;
  const int64_t counted = counted_rows(args);
  uint32_t largest[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    largest[r] = found[r].template of_warp < Tile::lanes == 0 ? 32 : Tile::lanes > ();
    if constexpr (Tile::lanes == 0) group.raise(largest[r], shared + r);
  }
  if constexpr (Tile::lanes == 0) group.sync();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first_row + r * Tile::groups;
    if (at.col != 0 || row >= counted) continue;
    store_amax<T>(args, row, Tile::lanes == 0 ? shared[r] : largest[r]);
  }
}

}  // namespace
}  // namespace redline::cuda
