// Host side of a launch: device types of host dtypes, and the one launch function.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "redline/core/check.h"
#include "redline/core/dtype.h"
#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"
#include "redline/core/watch.h"
#include "redline/kernels/cuda/alignment.h"

namespace redline::cuda {

inline void check_status(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    fail(__FILE__, __LINE__, what, ": ", cudaGetErrorName(status), ": ",
         cudaGetErrorString(status));
  }
}

// Shared memory that a block may have, in KiB (CUDA C++ Programming Guide, table of compute
// capabilities).
constexpr int shared_kib(int capability) {
  if (capability == 80 || capability == 87) return 163;
  return capability >= 90 && capability < 120 ? 227 : 99;
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  int cluster = 1;                // blocks per cluster along x
  bool overlap_previous = false;  // from Hopper on; the kernel calls wait_for_previous_launch()
  Stream stream;
};

inline void report_launch(Watcher& watcher, const void* kernel, const LaunchConfig& config) {
  const char* name = nullptr;
  check_status(cudaFuncGetName(&name, kernel), "cudaFuncGetName");
  watcher.launch({.kernel = name,
                  .grid = {config.grid.x, config.grid.y, config.grid.z},
                  .block = {config.block.x, config.block.y, config.block.z},
                  .shared_bytes = config.shared_bytes,
                  .cluster = config.cluster});
}

// Attributes are added only when asked for: a cluster attribute of 1 makes a launch of 4,096 blocks
// almost three times slower than none (H200: 11.9 us against 4.4).
inline void launch_kernel(const void* kernel, const LaunchConfig& config, void** arguments) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  if (Watcher* seen = watcher()) report_launch(*seen, kernel, config);
  // 48 KiB go without asking; the kernel's static arrays count too, 16 KiB at
  // most where there are others.
  if (config.shared_bytes > 32 * 1024) {
    check_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      config.shared_bytes),
                 "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = static_cast<cudaStream_t>(config.stream.handle);
  launch_config.attrs = attributes;
  if (config.cluster > 1) {
    auto& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  }
  if (config.overlap_previous && config.stream.capability >= 90) {
    auto& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  check_status(cudaLaunchKernelExC(&launch_config, kernel, arguments), "launch");
}

// What depends on the kernel's type is a line: the host's compiler repeats it for every kernel.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config,
            std::type_identity_t<Parameters>... arguments) {
  void* addresses[] = {&arguments...};
  launch_kernel(reinterpret_cast<const void*>(kernel), config, addresses);
}

// The device type that stores a host dtype's elements.
template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<float16> {
  using type = __half;
};
template <>
struct DeviceType<bfloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using device_type = typename DeviceType<T>::type;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace redline::cuda
