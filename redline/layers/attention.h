// Attention: norm, packed QKV projection, rotary, attention and the output projection.
#pragma once

#include "redline/layers/linear.h"
#include "redline/layers/module.h"
#include "redline/layers/norm.h"
#include "redline/layers/rotary.h"

namespace redline::layers {

struct AttentionOptions {
  int64_t hidden_size = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // 0: as many as heads
  int64_t head_dim = 0;  // 0: hidden_size / heads
  bool bias = false;
  bool causal = true;
  std::optional<std::array<int64_t, 2>> window = {};  // keys kept before and after the query's own
  bool qk_norm = false;
  bool recompute = false;  // backward runs attention again from q, k and v: it keeps no scores
  RotaryOptions rotary = {};
  NormOptions norm = {};
};

// Where the tokens stand: positions for rotary; cu_seqlens [sequences + 1] int32 for sequences
// packed into [tokens, hidden_size], with the longest sequence's length where it is known.
struct Packing {
  std::optional<Tensor> positions = {};
  std::optional<Tensor> cu_seqlens = {};
  std::optional<int64_t> max_seqlen = {};
};

struct CoreAttentionOptions {
  bool causal = true;
  std::optional<double> scale = {};  // absent: 1 / sqrt(head_dim)
  std::optional<std::array<int64_t, 2>> window = {};
  double dropout = 0.0;
};

// softmax(scale q k^T) v with the sequence first: q [s, b, heads, d], k and v [s, b, kv_heads, d]
// -> [s, b, heads d].
Tensor attend_sequence_first(const Tensor& q, const Tensor& k, const Tensor& v,
                             const CoreAttentionOptions& options);

// y = attention(rotary(qkv(norm(x)))) W^T; x [batch, sequence, hidden_size]. layernorm_qkv.weight
// holds, for each of kv_heads groups, its queries' rows, its key's and its value's.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  explicit AttentionImpl(const AttentionOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x, const Packing& packing = {});
  // {y, residual + dropout(x)}: x is dropped with the probability given, where it is not 0.
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual,
                                              const Packing& packing = {}, double dropout = 0);

  AttentionOptions options;  // kv_heads, head_dim and rotary.dim filled in
  LayerNormLinear layernorm_qkv = nullptr;
  Norm q_norm = nullptr, k_norm = nullptr;
  Linear proj = nullptr;

 private:
  struct Heads {
    Tensor q, k, v;  // [..., heads or kv_heads, head_dim]
  };
  void check_input(const Tensor& x, const Packing& packing) const;
  Heads split(const Tensor& qkv) const;
  Heads rotate(const Tensor& qkv, const Packing& packing);
  Tensor attend(const Tensor& qkv, const Packing& packing);

  RotaryTables tables_;
};
using Attention = Holder<AttentionImpl, AttentionOptions>;

}  // namespace redline::layers
