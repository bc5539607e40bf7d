#include <array>
#include <atomic>

#include "redline/kernels/cuda/capability.h"
#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {
namespace {

__global__ void probe_kernel() {}

// Of the PTX that this file's machine code for a device was made from.
int code_capability(int device) {
  int current = 0;
  check_status(cudaGetDevice(&current), "cudaGetDevice");
  if (device != current) check_status(cudaSetDevice(device), "cudaSetDevice");
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (device != current) check_status(cudaSetDevice(current), "cudaSetDevice");
  check_status(status, "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

}  // namespace

int capability_on(int device, int device_capability) {
  if (device_capability < 90) return device_capability;
  static std::array<std::atomic<int>, 64> found = {};  // by device; the question takes microseconds
  std::atomic<int>* known = device < 64 ? &found[device] : nullptr;
  int usable = known != nullptr ? known->load(std::memory_order_relaxed) : 0;
  if (usable == 0) {
    usable = usable_capability(device_capability, code_capability(device));
    if (known != nullptr) known->store(usable, std::memory_order_relaxed);
  }
  return usable;
}

}  // namespace redline::cuda
