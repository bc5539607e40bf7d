// Random numbers of an op: seed and offset from torch's generator of the tensor's device.
#pragma once

#include "redline/core/philox.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// CPU: a fresh seed from torch's default generator. CUDA: the default generator's seed, and its
// offset, which moves on by one call; while a graph is captured, pointers to them. Throws in a
// build without CUDA.
PhiloxState draw_philox(const at::Tensor& like);

inline void check_probability(const char* op, double probability) {
  TORCH_CHECK(probability >= 0 && probability <= 1, op, ": probability: expected 0 to 1, not ",
              probability);
}

}  // namespace redline::ops
