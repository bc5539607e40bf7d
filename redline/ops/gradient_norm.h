// The norm of a list of gradients and what clipping by it needs (formulas:
// kernels/gradient_norm.h). No derivatives. Nothing is read back to the host.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// The norm of all elements, a scalar on the gradients' one device: float32, or float64 when the
// first gradient is.
at::Tensor gradient_norm(at::TensorList gradients);

// min(1, max_norm / (norm + 1e-6)), a float32 scalar. AdamW's step takes it.
at::Tensor clip_coefficient(const at::Tensor& norm, double max_norm);

// Multiplies the gradients by a float32 scalar, in place.
void scale_gradients(at::TensorList gradients, const at::Tensor& coefficient);

}  // namespace redline::ops
