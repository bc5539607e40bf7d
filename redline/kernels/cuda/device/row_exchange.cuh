// Sums over the threads that share a row, for kernels that walk over many rows: a thread posts its
// part of one row and collects the sums of the row before, so that no one waits for the slowest of
// a row before the next is read. In an order that the number of threads alone fixes.
#pragma once

#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/device/shared_barrier.cuh"

namespace redline::cuda {

// Rows take four places in turn. Who posts row r + 1 has collected row r - 1, for which every warp
// had posted it, and so had done with row r - 3, whose place row r + 1 takes: no other wait guards
// a place against being written too early. With three, row r - 2 might still be read.
inline constexpr int exchange_places = 4;

// What the groups of a block exchange Count values through. Warps: of all groups together.
template <int Count, int Cluster, int Warps>
struct ExchangeMemory {
  float posted[exchange_places][Count][Warps];                        // of each warp
  float gathered[exchange_places][Count][Cluster > 1 ? Cluster : 1];  // of each block
  SharedBarrier warps_came[exchange_places][Warps];                   // by a group's first warp
  SharedBarrier blocks_came[exchange_places];
};

// One or two sums over a warp's lanes at once: half the shuffles of two sums. `held` is the lane's
// own result: with two, the first in lanes 0 to 15 and the second in the others.
template <int Count>
struct WarpSums {
  static_assert(Count == 1 || Count == 2);
  static constexpr int lanes = 32 / Count;  // that hold the same
  float held;

  static __device__ __forceinline__ int value() {
    return static_cast<int>(threadIdx.x % 32 / lanes);
  }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % lanes); }

  __device__ __forceinline__ explicit WarpSums(const float (&values)[Count]) {
    if constexpr (Count == 1) {
      held = warp_sum(values[0]);
    } else {
      const bool second = value() == 1;
      const float other = __shfl_xor_sync(0xffffffffu, second ? values[0] : values[1], 16);
      add_lanes((second ? values[1] : values[0]) + other);
    }
  }
  // Of `count` values each, at most 32, in order of the lanes that read them.
  __device__ __forceinline__ WarpSums(const float* from, int stride, int count) {
    const int first = lane();
    from += value() * stride;
    float sum = first < count ? from[first] : 0.0f;
    if (Count == 2 && first + lanes < count) sum += from[first + lanes];
    add_lanes(sum);
  }
  __device__ __forceinline__ void give(float (&sums)[Count]) const {
    sums[0] = held;
    if constexpr (Count == 2) {
      const float other = __shfl_xor_sync(0xffffffffu, held, 16);
      sums[0] = value() == 1 ? other : held;
      sums[1] = value() == 1 ? held : other;
    }
  }

 private:
  __device__ __forceinline__ void add_lanes(float sum) {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    held = sum;
  }
};

// Lanes: threads of a row within a warp, which need no memory and collect a row before they post
// the next; or 0: `warps` warps of each of Cluster blocks, the first of which is `first_warp`.
template <int Lanes, int Cluster, int Count, int Warps>
class RowExchange {
 public:
  using Memory = ExchangeMemory<Count, Cluster, Warps>;

  // By all threads of the block, before a barrier: __syncthreads(), or the cluster's.
  static __device__ __forceinline__ void init(Memory& memory, int groups, int warps) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < exchange_places * groups) {
      memory.warps_came[thread / groups][thread % groups * warps].init(warps * Count);
    }
    if (Cluster > 1 && thread < exchange_places) memory.blocks_came[thread].init(1);
  }

  __device__ __forceinline__ RowExchange(Memory& memory, int first_warp, int warps)
      : memory_(memory), first_warp_(first_warp), warps_(warps) {}

  // This thread's values of row `turn`, counted from 0.
  __device__ __forceinline__ void post(const float (&values)[Count], uint32_t turn) {
    if constexpr (Lanes == 16) {
#pragma unroll
      for (int k = 0; k < Count; ++k) sums_[k] = warp_sum<Lanes>(values[k]);
    } else {
      const WarpSums<Count> sums(values);
      if constexpr (Lanes == 32) return sums.give(sums_);
      const uint32_t place = turn % exchange_places, warp = threadIdx.x / 32;
      // The lanes' reads of an earlier row come before this arrival, by which others may write
      // there: shuffles order no memory.
      __syncwarp();
      if (sums.lane() == 0) {  // one lane per value
        memory_.posted[place][sums.value()][warp] = sums.held;
        memory_.warps_came[place][first_warp_].arrive();
      }
      // The warps take turns to hand the block's sums to the cluster.
      if constexpr (Cluster > 1) {
        if (turn % static_cast<uint32_t>(warps_) == warp) hand_on(turn);
      }
    }
  }

  // The sums over row `turn`, in every thread.
  __device__ __forceinline__ void collect(float (&sums)[Count], uint32_t turn) {
    if constexpr (Lanes != 0) {
#pragma unroll
      for (int k = 0; k < Count; ++k) sums[k] = sums_[k];
    } else if constexpr (Cluster > 1) {
      const uint32_t place = turn % exchange_places;
      memory_.blocks_came[place].wait(parity(turn));
      WarpSums<Count>(memory_.gathered[place][0], Cluster, Cluster).give(sums);
    } else {
      posted(turn).give(sums);
    }
  }

 private:
  static __device__ __forceinline__ int parity(uint32_t turn) {
    return static_cast<int>(turn / exchange_places % 2);
  }
  // By all warps of this block's group, once they have come.
  __device__ __forceinline__ WarpSums<Count> posted(uint32_t turn) const {
    const uint32_t place = turn % exchange_places;
    memory_.warps_came[place][first_warp_].wait(parity(turn));
    return WarpSums<Count>(memory_.posted[place][0] + first_warp_, Warps, warps_);
  }
  __device__ __forceinline__ void hand_on(uint32_t turn) {
    const uint32_t place = turn % exchange_places;
    const WarpSums<Count> sums = posted(turn);
    SharedBarrier& came = memory_.blocks_came[place];
    if (threadIdx.x % 32 == 0) came.expect(Cluster * Count * 4);
    if (sums.lane() < Cluster) {
      came.send(&memory_.gathered[place][sums.value()][cluster_rank()],
                static_cast<uint32_t>(sums.lane()), sums.held);
    }
  }

  Memory& memory_;
  int first_warp_, warps_;
  float sums_[Count];  // within a warp: of the row that was posted last
};

}  // namespace redline::cuda
