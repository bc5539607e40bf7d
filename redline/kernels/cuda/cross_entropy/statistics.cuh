// A row's statistics (kernels/cross_entropy.h): what its threads add up, and how a block merges it.
#pragma once

#include "redline/kernels/cuda/cross_entropy/logits.cuh"
#include "redline/kernels/cuda/device/reduce.cuh"

namespace redline::cuda {
namespace {

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// The maximum of what a thread has seen, the sum of e^(x - maximum), the sum of x.
struct Running {
  float maximum, exponentials, sum;
};

struct Formula {
  float softcap;
  bool with_sum;
};

// The largest element; of 16-bit logits two at a time.
template <typename T>
__device__ __forceinline__ float largest(const Packed<T> (&packed)[in_flight]) {
  constexpr int count = in_flight * vector_size<T>;
  if constexpr (sizeof(T) == 2) {
    const auto* pairs = reinterpret_cast<const pair_of<T>*>(packed);
    pair_of<T> found = pairs[0];
#pragma unroll
    for (int k = 1; k < count / 2; ++k) found = __hmax2(found, pairs[k]);
    return fmaxf(to_float(found.x), to_float(found.y));
  } else {
    float found = packed[0].values[0];
#pragma unroll
    for (int k = 1; k < count; ++k) found = fmaxf(found, packed[k / 4].values[k % 4]);
    return found;
  }
}

// Adds vectors whose elements beyond the row hold -inf. A first pass finds the maximum, which a
// softcap leaves where it is, so that the sum is rescaled once a tile and not once an element.
template <typename T>
__device__ __forceinline__ void add_vectors(const Packed<T> (&packed)[in_flight], RowVectors at,
                                            Formula formula, Running& running) {
  constexpr int N = vector_size<T>, count = in_flight * N;
  if (at.col >= at.cols) return;
  const auto raw = [&](int k) { return element(packed[k / N], k % N); };
  const float maximum = fmaxf(running.maximum, capped(largest(packed), formula.softcap));
  if (maximum > running.maximum) {
    running.exponentials *= exponential<fast<T>>(running.maximum - maximum);
    running.maximum = maximum;
  }
  const float origin = maximum == negative_infinity() ? 0.0f : maximum;
  if (formula.softcap == 0.0f && !formula.with_sum) {
#pragma unroll
    for (int k = 0; k < count; ++k) running.exponentials += exponential<fast<T>>(raw(k) - origin);
    return;
  }
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (at.col + k / N * at.step + k % N >= at.cols) continue;
    const float x = capped(raw(k), formula.softcap);
    running.sum += x;
    running.exponentials += exponential<fast<T>>(x - origin);
  }
}

// The largest value of the block, in every thread.
template <int Threads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if constexpr (Threads > 32) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_max(lane < Threads / 32 ? scratch[lane] : negative_infinity());
  }
  return value;
}

// Sums of exponentials below `from` as one below `to`, the larger. All logits -inf: a sum of 0.
template <typename T>
__device__ __forceinline__ float rescaled(float exponentials, float from, float to) {
  return exponentials * exponential<fast<T>>(from - (to == negative_infinity() ? 0.0f : to));
}

constexpr int statistics_scratch = 3 * 32;  // floats of shared memory

// What the block's threads have seen, in every thread.
template <typename T, int Threads>
__device__ __forceinline__ Running over_block(const Running& own, float* scratch) {
  const float maximum = block_max<Threads>(own.maximum, scratch);
  float sums[2] = {rescaled<T>(own.exponentials, own.maximum, maximum), own.sum};
  block_sum<Threads>(sums, scratch + 32);
  return {maximum, sums[0], sums[1]};
}

}  // namespace
}  // namespace redline::cuda
