// The loss of a head, cross_entropy(x W^T + bias, targets), chunk by chunk: the logits of a part of
// the tokens, or of the vocabulary, stand in one buffer at a time (formulas:
// kernels/cross_entropy.h; sizes: docs/memory.md). The products are gemm's.
// Forward computes each row's statistics (one product). Backward computes the logits again, a slice
// of the vocabulary at a time, writes their gradient over them and multiplies (three products): the
// gradient of a weight's row is one product over all tokens, rounded once. Kept: x, the weight, the
// bias, and three float32 per token, four with label smoothing.
#pragma once

#include "redline/ops/cross_entropy.h"
#include "redline/ops/linear.h"

namespace redline::ops {

struct FusedLinearCrossEntropyOptions {
  // inplace_backward has no meaning: the logits are no one's. With loss_scale, which may be one
  // number per token with reduction "none", forward computes the gradients too, a chunk of the
  // tokens at a time and without a product computed twice, and keeps them: the weight's in float32,
  // or in its own dtype where three chunks at most are summed and main_grad is not given.
  CrossEntropyOptions loss = {};
  // main_grad is written in backward alone. `delayed` is refused: it would keep the logits.
  WeightGradientOptions weight_gradient = {};
};

// The loss of x [..., hidden], weight [vocabulary, hidden], targets [...] of int64 or int32 and
// bias [vocabulary]: float32 (float64 for float64), a scalar, or the targets' shape with reduction
// "none". Products that no one needs, for x or the weight is frozen, are left out.
at::Tensor fused_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& targets,
                                      const std::optional<at::Tensor>& bias = {},
                                      const FusedLinearCrossEntropyOptions& options = {});

}  // namespace redline::ops
