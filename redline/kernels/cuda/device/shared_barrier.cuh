// A barrier in shared memory (mbarrier) of which a thread may say that it has come without waiting
// there; across blocks of a cluster, bytes may come instead of threads.
#pragma once

#include <cstdint>

#include "redline/kernels/cuda/device/cluster.cuh"

namespace redline::cuda {

// A phase ends when `count` arrivals have come and all bytes that they said to expect.
class SharedBarrier {
 public:
  // By one thread; __syncthreads() or, where another block sends, the cluster's barrier must follow
  // before anyone arrives.
  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // What this thread stored before is seen by those that wait for the phase.
  __device__ __forceinline__ void arrive() {
    asm volatile(
        "{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address())
        : "memory");
  }
  // Arrives, and the phase waits for so many bytes more.
  __device__ __forceinline__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
#endif
  }
  // Stores into the same place of block `rank`, whose barrier counts the four bytes. Unlike the
  // cluster's barrier it does not wait for the stores to global memory that came before.
  __device__ __forceinline__ void send(float* place, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                     remote_address(place, rank)),
                 "f"(value), "r"(remote_address(&state_, rank))
                 : "memory");
#endif
  }
  // Until the phase of this parity has ended: the first has parity 0. At the block's own scope: the
  // cluster's would throw the multiprocessor's first-level cache away at every wait (CCTL.IVALL),
  // and what another block sends lies in this one's shared memory.
  __device__ __forceinline__ void wait(int parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n .reg .pred p;\n "
#if __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64"
#else
          "mbarrier.test_wait.parity.shared.b64"
#endif
          " p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    }
  }

 private:
  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }

  uint64_t state_;
};

}  // namespace redline::cuda
