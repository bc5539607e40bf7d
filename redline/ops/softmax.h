// Scaled masked softmax over the last axis (formula: kernels/softmax.h): for attention that is not
// fused. scores are [..., heads, queries, keys], or fewer dimensions; mask is bool, broadcast to
// the scores, true where a key is excluded; sink is [heads], a logit in the denominator. causal is
// aligned at the bottom right; window keeps the last keys up to the diagonal. Rows without a key
// give zeros. Kept for backward: the probabilities and, with a sink, one float32 per row.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

struct SoftmaxOptions {
  double scale = 1;
  bool causal = false;
  std::optional<int64_t> window = {};  // keys
};

at::Tensor softmax(const at::Tensor& scores, const std::optional<at::Tensor>& mask = {},
                   const std::optional<at::Tensor>& sink = {}, const SoftmaxOptions& options = {});

}  // namespace redline::ops
