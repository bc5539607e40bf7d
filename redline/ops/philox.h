// Random numbers of an op: seed and offset from torch's generator of the tensor's device.
#pragma once

#include "redline/core/philox.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// CPU: a fresh seed from torch's default generator. CUDA: the default generator's seed, and its
// offset, which moves on by one call; while a graph is captured, pointers to them. Throws in a
// build without CUDA.
PhiloxState draw_philox(const at::Tensor& like);

}  // namespace redline::ops
