#include <array>
#include <atomic>

#include "redline/kernels/cuda/capability.h"
#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {
namespace {

__global__ void probe_kernel() {}

// Of the PTX that this file's machine code was made from; of the current device.
int code_capability() {
  cudaFuncAttributes attributes;
  check_status(cudaFuncGetAttributes(&attributes, probe_kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

}  // namespace

int usable_capability(int device, int capability) {
  if (capability < 90) return capability;
  static std::array<std::atomic<int>, 64> found = {};  // by device; the question takes microseconds
  std::atomic<int>* known = device < 64 ? &found[device] : nullptr;
  int usable = known != nullptr ? known->load(std::memory_order_relaxed) : 0;
  if (usable == 0) {
    usable = code_capability() < 90 ? 89 : capability;
    if (known != nullptr) known->store(usable, std::memory_order_relaxed);
  }
  return usable;
}

}  // namespace redline::cuda
