// 16 bytes from memory to shared memory that no register holds on the way (cp.async).
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

namespace redline::cuda {

// Past the first-level cache, the 128 bytes around it into the second. Both addresses are multiples
// of 16 bytes.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(to)), from);
}

// Until all but the last `later` groups that this thread committed are there; four at most may be
// on their way.
__device__ __forceinline__ void wait_for_copies(int later) {
  switch (later) {
    case 0:
      return __pipeline_wait_prior(0);
    case 1:
      return __pipeline_wait_prior(1);
    case 2:
      return __pipeline_wait_prior(2);
    case 3:
      return __pipeline_wait_prior(3);
    default:
      return __pipeline_wait_prior(4);
  }
}

}  // namespace redline::cuda
