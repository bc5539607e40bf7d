// Attention that torch's fused kernels serve: no mask but a causal one from the top left.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

struct PlainAttention {
  bool causal = false;
  std::optional<double> scale = {};  // absent: 1 / sqrt(head_dim)
};

// [batch, queries, heads, head_dim], contiguous, of q in this layout and k and v [batch, keys,
// kv_heads, head_dim], by the kernel that torch chooses. One node of autograd around a fused
// kernel; a composition of torch's ops where there is none, and for whoever looks at ops: tracing,
// dispatch modes, subclasses, forward mode.
at::Tensor attend_plain(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const PlainAttention& options);

// Each key head of `tensor` for all of the query heads that share it.
at::Tensor repeat_heads(const at::Tensor& tensor, const c10::SymInt& heads, int64_t axis);

}  // namespace redline::ops
