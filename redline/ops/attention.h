// Scaled dot product attention: out = softmax(scale q k^T) v per head, query head i with key and
// value head i / (heads / kv_heads). q is [batch, queries, heads, head_dim], k and v [batch, keys,
// kv_heads, head_dim]; or packed, [tokens, heads, head_dim] with cu_seqlens [sequences + 1]. causal
// is aligned at the bottom right: query i sees the keys j <= i + keys - queries (of its own
// sequence). A window {before, after} keeps that many keys before and after this diagonal, -1 all.
//
// Plain and causal attention run on torch's own choice of kernel, without a mask: cuDNN, flash or
// memory-efficient on CUDA, flash on CPU. Windows, packed sequences, sinks, softcaps, statistics,
// causal attention with queries != keys, and `deterministic` on CUDA run a reference path: scores
// in float32, as large as they are, our softmax, then the product. A fused kernel of torch's is one
// node of autograd (ops/attention_plain.h), which keeps q, k, v, out and one float32 per row; the
// rest is a composition of differentiable ops and keeps what they do (reference path: the scores
// and probabilities).
// Not repeatable: torch's CUDA kernels give other bits in each backward; deterministic = true, or
// torch's own deterministic flag, gives the same. Dropout and a given rng_state are not built.
#pragma once

#include <array>

#include "redline/ops/torch.h"

namespace redline::ops {

struct AttentionOptions {
  bool causal = false;
  std::optional<double> scale = {};                    // absent: 1 / sqrt(head_dim)
  std::optional<std::array<int64_t, 2>> window = {};   // keys before and after the diagonal
  std::optional<at::Tensor> cu_seqlens_q = {};         // [sequences + 1] int32 or int64
  std::optional<at::Tensor> cu_seqlens_k = {};         // [sequences + 1]
  std::optional<at::Tensor> cu_seqlens_q_padded = {};  // where the sequences start in memory
  std::optional<at::Tensor> cu_seqlens_k_padded = {};
  std::optional<int64_t> max_seqlen_q = {};
  std::optional<int64_t> max_seqlen_k = {};
  std::optional<at::Tensor> sink = {};  // [heads], a logit in the denominator
  std::optional<double> softcap = {};   // scores become softcap tanh(scale q k^T / softcap)
  double dropout = 0;                   // refused unless 0
  std::optional<at::Tensor> rng_state = {};
  bool deterministic = false;
  bool return_log_sum_exp = false;
  bool return_max_logit = false;
};

// {out, log_sum_exp [batch, heads, queries] or [heads, tokens], max_logit [heads]}, the last two
// float32, and undefined unless asked for. out has q's layout and v's head_dim; a packed token
// outside all sequences, or a query that sees no key, gives 0.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k,
                                                         const at::Tensor& v,
                                                         const AttentionOptions& options = {});

}  // namespace redline::ops
