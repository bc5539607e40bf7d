// Sums over the threads that share a row, in an order that the thread count alone fixes.
#pragma once

#include <cstdint>

namespace redline::cuda {

// The Lanes neighbours of a lane, itself among them.
template <int Lanes>
__device__ __forceinline__ uint32_t lane_mask() {
  if constexpr (Lanes == 32) return 0xffffffffu;
  return ((1u << (Lanes % 32)) - 1) << (threadIdx.x % 32 / Lanes * Lanes);
}

// Every lane gets the sum over its Lanes neighbours: the butterfly adds the same pairs in each. The
// other lanes of the warp may be elsewhere.
template <int Lanes = 32>
__device__ __forceinline__ float warp_sum(float value) {
  const uint32_t mask = lane_mask<Lanes>();
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(mask, value, offset);
  }
  return value;
}

// The same of several values, whose shuffles overlap.
template <int Lanes = 32, int Rows, int Count>
__device__ __forceinline__ void warp_sums(float (&values)[Rows][Count]) {
#pragma unroll
  for (int k = 0; k < Rows * Count; ++k) {
    float& value = values[k / Count][k % Count];
    value = warp_sum<Lanes>(value);
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Count sums at once over the Threads of a block. `scratch` holds Count * 32 floats and may be used
// again after the next __syncthreads(); calls in a row need two scratches in turn.
template <int Threads, int Count>
__device__ __forceinline__ void block_sum(float (&values)[Count], float* scratch) {
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] = warp_sum(values[k]);
  if constexpr (Threads > 32) {
    constexpr int warps = Threads / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < Count; ++k) scratch[k * 32 + warp] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      values[k] = warp_sum(lane < warps ? scratch[k * 32 + lane] : 0.0f);
    }
  }
}

}  // namespace redline::cuda
