// The threads that share a row, and sums over them in an order that their number alone fixes: lanes
// of a warp, whole warps of a block, or all warps of the blocks of a cluster.
#pragma once

#include "redline/kernels/cuda/device/cluster.cuh"
#include "redline/kernels/cuda/device/reduce.cuh"

namespace redline::cuda {

// Lanes: threads of a row within a warp, or 0: `warps` warps of each of Cluster blocks. `slots` is
// shared memory, slot_count(warps) floats for each value that is summed at once, twice if sums
// follow one another without a barrier between.
template <int Lanes, int Cluster>
struct RowGroup {
  float* slots = nullptr;
  int warp = 0, warps = 1;  // of this block

  static constexpr int slot_count(int warps) { return Cluster * warps; }

  __device__ __forceinline__ void sync() const {
    if constexpr (Cluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // Stores a warp's value, which its lanes hold alike, at `place` of every block of the cluster.
  __device__ __forceinline__ void post(float value, float* place) const {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (Cluster > 1) {
      if (lane < Cluster) store_remote(place, lane, value);
    } else if (lane == 0) {
      *place = value;
    }
  }

  // Raises `place`, of the cluster's first block, to a warp's value, which its lanes hold alike.
  __device__ __forceinline__ void raise(uint32_t value, uint32_t* place) const {
    if (threadIdx.x % 32 != 0) return;
    if constexpr (Cluster > 1) {
      raise_remote(place, 0, value);
    } else {
      atomicMax(place, value);
    }
  }

  // Gives all warps of the row each warp's values: value k of warp e, counted over the cluster,
  // lies in to[k * slot_count(warps) + e].
  template <int Count>
  __device__ __forceinline__ void share(const float (&values)[Count], float* to) const {
    const int own = static_cast<int>(cluster_rank()) * warps + warp;
#pragma unroll
    for (int k = 0; k < Count; ++k) post(values[k], to + k * slot_count(warps) + own);
    sync();
  }

  // The sum over all warps of one value that was shared.
  __device__ __forceinline__ float shared_sum(const float* from) const {
    float sum = 0.0f;
    for (int e = static_cast<int>(threadIdx.x) % 32; e < slot_count(warps); e += 32) sum += from[e];
    return warp_sum(sum);
  }

  // The sum over all threads of the row; `to` is not used within a warp.
  __device__ __forceinline__ float sum(float value, float* to) const {
    if constexpr (Lanes != 0) return warp_sum<Lanes>(value);
    const float own[1] = {warp_sum(value)};
    share(own, to);
    return shared_sum(to);
  }
};

}  // namespace redline::cuda
