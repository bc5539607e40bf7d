// Programmatic dependent launch: a kernel that was launched with `overlap_previous` may start while
// the one before it on the stream still runs. Nothing below compute capability 9.0.
#pragma once

namespace redline::cuda {

// In every block, before the first access to memory that the kernel before wrote, or may still read
// where this one writes; it has ended then.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may start, as soon as all blocks have said so and there is room: it
// finds its place beside the last blocks of this one.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The same where blocks are many, which is where it helps (H100: layer_norm 8192 x 4096 49.3
// -> 48.7 us, swiglu 8192 x 1536 27.1 -> 26.7). The one row of 1 x 8192 was slower by it, 1.85
// -> 1.90 us.
__device__ __forceinline__ void allow_next_launch_of_many() {
  if (gridDim.x >= 1024) allow_next_launch();
}

}  // namespace redline::cuda
