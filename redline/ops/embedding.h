// Embedding (formula: kernels/embedding.h). Kept for backward: the tokens. Refuses what does not
// fit with redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// [..., hidden] of weight's dtype; tokens: [...] int64 or int32; weight: [vocabulary, hidden]. The
// row padding_idx, counted from the end when negative, gets no gradient.
at::Tensor embedding(const at::Tensor& tokens, const at::Tensor& weight,
                     std::optional<int64_t> padding_idx = {});

// The gradient of weight, [vocabulary, hidden] of y_grad's dtype.
at::Tensor embedding_backward(const at::Tensor& y_grad, const at::Tensor& tokens,
                              c10::SymInt vocabulary, std::optional<int64_t> padding_idx = {});

// Adds it to `buffer`, [vocabulary, hidden] of y_grad's dtype or float32.
void embedding_backward_into(const at::Tensor& buffer, const at::Tensor& y_grad,
                             const at::Tensor& tokens, std::optional<int64_t> padding_idx = {});

}  // namespace redline::ops
