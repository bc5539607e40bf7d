// Blocks of a cluster: their rank, their barrier, and stores into one another's shared memory.
// Below compute capability 9.0 there are none: the host launches no kernel that asks for them.
#pragma once

#include <cstdint>

namespace redline::cuda {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all blocks; what they stored before is seen by all after.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same without waiting for this thread's earlier stores, which the others may then not see: for
// barriers that SharedBarrier::init() has made known.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where a place of this block's shared memory lies in that of block `rank`.
__device__ __forceinline__ uint32_t remote_address(const void* place, uint32_t rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
#endif
  return remote;
}

// Stores into the same place of the shared memory of block `rank`.
__device__ __forceinline__ void store_remote(float* place, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = remote_address(place, rank);
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
}

// Raises the same place of the shared memory of block `rank` to `value`, unless it is more already.
__device__ __forceinline__ void raise_remote(uint32_t* place, uint32_t rank, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = remote_address(place, rank);
  asm volatile("red.relaxed.cluster.shared::cluster.max.u32 [%0], %1;" ::"r"(remote), "r"(value)
               : "memory");
#endif
}

}  // namespace redline::cuda
