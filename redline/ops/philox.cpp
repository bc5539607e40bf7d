#include "redline/ops/philox.h"

#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#if REDLINE_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace redline::ops {
namespace {

PhiloxState draw_on_cuda(const at::Tensor& like) {
#if REDLINE_WITH_CUDA
  at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(like.get_device());
  const std::lock_guard<std::mutex> lock(generator.mutex());
  auto* cuda = at::check_generator<at::CUDAGeneratorImpl>(generator);
  const at::PhiloxCudaState state = cuda->philox_cuda_state(philox::offset_step);
  if (!state.captured_) {
    return {.seed = static_cast<int64_t>(state.seed_.val),
            .offset = static_cast<int64_t>(state.offset_.val)};
  }
  return {.seed = 0,
          .offset = static_cast<int64_t>(state.offset_intragraph_),
          .seed_pointer = reinterpret_cast<const int64_t*>(state.seed_.ptr),
          .offset_pointer = reinterpret_cast<const int64_t*>(state.offset_.ptr)};
#else
  TORCH_CHECK(false, "redline: this build has no CUDA kernels, and a tensor is on ", like.device());
#endif
}

}  // namespace

PhiloxState draw_philox(const at::Tensor& like) {
  if (like.is_cuda()) return draw_on_cuda(like);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
  return {.seed = static_cast<int64_t>(cpu->random64())};
}

}  // namespace redline::ops
