// Where the largest logit of a row is (kernels/cross_entropy.h), beside its statistics. A thread
// notes which of its tiles raised the maximum; only threads that hold the block's maximum read that
// tile again, for the first element that is it. NaN, which no maximum meets, makes the sum of
// exponentials NaN: the block then searches the row for the first.
#pragma once

#include "redline/kernels/cuda/cross_entropy/statistics.cuh"

namespace redline::cuda {
namespace {

constexpr int nowhere = INT32_MAX;

// The largest logit that was seen, and its column: of a thread the first column of the tile that
// has it, of a block its first column, or nowhere where all are -inf.
struct Largest {
  float value;
  int col;
};

template <typename T>
__device__ __forceinline__ void note_largest(const Packed<T> (&packed)[in_flight], int col,
                                             Largest& seen) {
  const float found = largest(packed);
  if (found > seen.value) seen = {found, col};
}

// The first column of this thread's tile at `at` that holds `value`.
template <typename T>
__device__ __forceinline__ int find_value(const T* row, RowVectors at, float value) {
  constexpr int N = vector_size<T>;
  int found = nowhere;
#pragma unroll
  for (int k = in_flight * N - 1; k >= 0; --k) {
    const int col = at.col + k / N * at.step + k % N;
    if (col < at.cols && to_float(row[col]) == value) found = col;
  }
  return found;
}

// The first column of this thread's vectors that holds NaN.
template <typename T>
__device__ __forceinline__ int find_nan(const T* row, int step, int cols) {
  constexpr int N = vector_size<T>;
  for (int first = static_cast<int>(threadIdx.x) * N; first < cols; first += step) {
    for (int col = first; col < min(first + N, cols); ++col) {
      if (isnan(to_float(row[col]))) return col;
    }
  }
  return nowhere;
}

template <int Threads>
struct LargestScratch {
  float values[Threads / 32];
  int columns[2][Threads / 32];
};

// The smallest value of the block, in every thread.
template <int Threads>
__device__ __forceinline__ int block_min(int value, int* scratch) {
  value = __reduce_min_sync(0xffffffffu, value);
  if constexpr (Threads > 32) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = __reduce_min_sync(0xffffffffu, lane < Threads / 32 ? scratch[lane] : nowhere);
  }
  return value;
}

// What the block's threads have seen of `row`, in every thread; `exponentials` is the block's sum.
template <typename T, int Threads>
__device__ __forceinline__ Largest over_block(const T* row, int cols, const Largest& own,
                                              float exponentials,
                                              LargestScratch<Threads>& scratch) {
  constexpr int step = Threads * vector_size<T>;
  if (isnan(exponentials)) {
    const int col = block_min<Threads>(find_nan(row, step, cols), scratch.columns[0]);
    if (col != nowhere) return {exponentials, col};
  }
  const float value = block_max<Threads>(own.value, scratch.values);
  int col = nowhere;
  if (own.value == value && value != negative_infinity()) {
    col = find_value(row, {own.col, step, cols, 0}, value);
  }
  return {value, block_min<Threads>(col, scratch.columns[1])};
}

__device__ __forceinline__ int64_t prediction_of(const Largest& found) {
  return found.col == nowhere ? 0 : found.col;
}

}  // namespace
}  // namespace redline::cuda
