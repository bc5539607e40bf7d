// Programmatic dependent launch: a kernel that was launched with `overlap_previous` may start while
// the one before it on the stream still runs. Nothing below compute capability 9.0.
#pragma once

namespace redline::cuda {

// Before the first access to memory that the kernel before wrote; it has ended then.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may start, as soon as all blocks have said so and there is room.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace redline::cuda
