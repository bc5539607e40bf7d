// Random numbers of an op: seed and offset from torch's generator of the tensor's device.
#pragma once

#include "redline/core/philox.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// CPU: a fresh seed from torch's default generator. CUDA: the default generator's seed, and its
// offset, which moves on by one call; while a graph is captured, pointers to them. Throws in a
// build without CUDA.
PhiloxState draw_philox(const at::Tensor& like);

// The state that forward wrote into `rng_state`, [2] int64, for a kernel on its device.
inline PhiloxState philox_from(const at::Tensor& rng_state) {
  const int64_t* state = rng_state.const_data_ptr<int64_t>();
  return {.seed = 0, .offset = 0, .seed_pointer = state, .offset_pointer = state + 1};
}

}  // namespace redline::ops
