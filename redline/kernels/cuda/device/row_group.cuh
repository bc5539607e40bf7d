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
  int barrier = 0;          // 1 to 15 where several groups of a block have one each

  static constexpr int slot_count(int warps) { return Cluster * warps; }

  __device__ __forceinline__ void sync() const {
    if constexpr (Cluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else if (barrier == 0) {
      __syncthreads();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(warps * 32) : "memory");
    }
  }

  // Gives all warps of the row each warp's values, which its lanes hold alike: value k of warp e,
  // counted over the cluster, lies in to[k * slot_count(warps) + e].
  template <int Count>
  __device__ __forceinline__ void share(const float (&values)[Count], float* to) const {
    const uint32_t lane = threadIdx.x % 32;
    const int own = static_cast<int>(cluster_rank()) * warps + warp;
    if constexpr (Cluster > 1) {
      if (lane < Cluster) {
#pragma unroll
        for (int k = 0; k < Count; ++k) {
          store_remote(to + k * slot_count(warps) + own, lane, values[k]);
        }
      }
    } else if (lane == 0) {
#pragma unroll
      for (int k = 0; k < Count; ++k) to[k * warps + warp] = values[k];
    }
    sync();
  }

  // The sum over all warps of one value that was shared.
  __device__ __forceinline__ float shared_sum(const float* from) const {
    float sum = 0.0f;
    for (int e = static_cast<int>(threadIdx.x) % 32; e < slot_count(warps); e += 32) sum += from[e];
    return warp_sum(sum);
  }

  // The Count sums over the threads of the row, in two steps between which other work may stand:
  // post() gives this thread's values away, collect() has the sums in every thread. `to` takes
  // post_count(warps) floats for each value. Posts in turn take two places in turn. Across blocks
  // `arrived` is the place's barrier and `parity` that of its phase.
  static constexpr int post_count(int warps) { return Cluster == 1 ? warps : 32 + Cluster; }

  template <int Count>
  __device__ __forceinline__ void post(float (&values)[Count], float* to,
                                       ByteBarrier* arrived = nullptr) const {
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] = warp_sum < Lanes == 0 ? 32 : Lanes > (values[k]);
    if constexpr (Lanes == 0) {
      const uint32_t lane = threadIdx.x % 32;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        if (lane == 0) to[k * post_count(warps) + warp] = values[k];
      }
      if constexpr (Cluster > 1) {
        __syncthreads();
        if (warp == 0) {
          if (lane == 0) arrived->expect(Cluster * Count * 4);
#pragma unroll
          for (int k = 0; k < Count; ++k) {
            float* own = to + k * post_count(warps);
            const float sum = warp_sum(static_cast<int>(lane) < warps ? own[lane] : 0.0f);
            if (lane < Cluster) arrived->send(own + 32 + cluster_rank(), lane, sum);
          }
        }
      }
    }
  }
  template <int Count>
  __device__ __forceinline__ void collect(float (&values)[Count], const float* to,
                                          ByteBarrier* arrived = nullptr, int parity = 0) const {
    if constexpr (Lanes == 0) {
      if constexpr (Cluster > 1) {
        arrived->wait(parity);
      } else {
        sync();
      }
      const int lane = static_cast<int>(threadIdx.x) % 32, count = Cluster > 1 ? Cluster : warps;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        const float* from = to + k * post_count(warps) + (Cluster > 1 ? 32 : 0);
        values[k] = warp_sum(lane < count ? from[lane] : 0.0f);
      }
    }
  }
  // Within a block.
  template <int Count>
  __device__ __forceinline__ void sum(float (&values)[Count], float* to) const {
    static_assert(Cluster == 1);
    post(values, to);
    collect(values, to);
  }
};

}  // namespace redline::cuda
