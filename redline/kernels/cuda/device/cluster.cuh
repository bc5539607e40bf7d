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

// A barrier in shared memory that bytes arrive at: each phase ends when this block has said how
// many it expects and they are there. Unlike the cluster's barrier it does not wait for the stores
// to global memory that came before.
class ByteBarrier {
 public:
  // By one thread; the cluster's barrier must follow before another block sends.
  __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // By one thread, once a phase.
  __device__ __forceinline__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
#endif
  }
  // Stores into the same place of block `rank`, whose barrier counts the four bytes.
  __device__ __forceinline__ void send(float* place, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                     remote_address(place, rank)),
                 "f"(value), "r"(remote_address(&state_, rank))
                 : "memory");
#endif
  }
  // Until the phase of this parity has ended: the first has parity 0.
  __device__ __forceinline__ void wait(int parity) {
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], "
          "%2;\n"
          " selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    }
#endif
  }

 private:
  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }

  uint64_t state_;
};

}  // namespace redline::cuda
