// residual + dropout(x + bias) (formula: kernels/bias_dropout_add.h). Kept for backward: the two
// int64 of the random numbers' state, and bias for its shape. Refuses what does not fit with
// redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// x, residual: [..., cols]; bias: [cols]; residual and bias of x's dtype or float32. y has
// residual's dtype. Without `training`, or with probability 0, nothing is dropped and no random
// number is drawn.
at::Tensor bias_dropout_add(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                            const at::Tensor& residual, double probability, bool training = true);

}  // namespace redline::ops
