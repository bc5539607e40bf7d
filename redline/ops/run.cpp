#include "redline/ops/run.h"

#if REDLINE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include "redline/kernels/cuda/capability.h"
#endif

namespace redline::ops {

Stream stream_of(const at::Tensor& tensor) {
#if REDLINE_WITH_CUDA
  const auto index = tensor.get_device();
  const cudaDeviceProp* properties = at::cuda::getDeviceProperties(index);
  return {.handle = at::cuda::getCurrentCUDAStream(index).stream(),
          .device = static_cast<int>(index),
          .sm_count = properties->multiProcessorCount,
          .capability = cuda::capability_on(static_cast<int>(index),
                                            properties->major * 10 + properties->minor)};
#else
  TORCH_CHECK(false, "redline: this build has no CUDA kernels, and a tensor is on ",
              tensor.device(), "; build on a machine with the CUDA toolkit (redline doctor)");
#endif
}

at::DataPtr workspace_of([[maybe_unused]] int64_t bytes) {
#if REDLINE_WITH_CUDA
  if (bytes > 0) return c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
#endif
  return {};
}

// As at::parallel_for shares it out. The reason names the limit, for it is one of all counts.
void report_ranges(Watcher& watcher, int64_t count, int64_t grain, const char* unit) {
  const int64_t tasks = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  watcher.choice(message(grain > 1 ? "up to " : "", grain, " ", unit, " a task"));
  watcher.launch({.kernel = {},
                  .grid = {tasks, 1, 1},
                  .block = {std::min(tasks, threads), 1, 1},
                  .shared_bytes = 0,
                  .cluster = 1});
}

void check_devices(const char* op, const at::Tensor& first,
                   std::initializer_list<NamedTensor> others) {
  for (const auto& [name, tensor] : others) {
    TORCH_CHECK(!tensor || tensor->device() == first.device(), op, ": ", name,
                ": expected a tensor on ", first.device(), ", not on ", tensor->device());
  }
}

}  // namespace redline::ops
