#include "redline/layers/attention.h"

#include "redline/layers/recompute.h"
#include "redline/ops/attention.h"
#include "redline/ops/rotary.h"

namespace redline::layers {

AttentionImpl::AttentionImpl(const AttentionOptions& given) : options(given) {
  const int64_t heads = options.heads;
  TORCH_CHECK(heads > 0, "Attention: heads: expected 1 or more, not ", heads);
  if (!options.kv_heads) options.kv_heads = heads;
  TORCH_CHECK(options.kv_heads > 0 && heads % options.kv_heads == 0,
              "Attention: kv_heads: expected a divisor of ", heads, ", not ", options.kv_heads);
  TORCH_CHECK(options.head_dim || options.hidden_size % heads == 0,
              "Attention: heads: expected a divisor of hidden_size ", options.hidden_size, ", not ",
              heads);
  if (!options.head_dim) options.head_dim = options.hidden_size / heads;
  const int64_t rotary_dim = options.rotary.dim.value_or(options.head_dim);
  TORCH_CHECK(rotary_dim % 2 == 0 && rotary_dim >= 0 && rotary_dim <= options.head_dim,
              "Attention: rotary_dim: expected an even number up to the head_dim ",
              options.head_dim, ", not ", rotary_dim);
  options.rotary.dim = rotary_dim;
  reset();
}

void AttentionImpl::reset() {
  const int64_t head_dim = options.head_dim;
  layernorm_qkv = register_module(
      "layernorm_qkv",
      LayerNormLinear({.in_features = options.hidden_size,
                       .out_features = (options.heads + 2 * options.kv_heads) * head_dim,
                       .bias = options.bias,
                       .norm = options.norm}));
  if (options.qk_norm) {
    q_norm = register_module("q_norm", Norm(head_dim, options.norm));
    k_norm = register_module("k_norm", Norm(head_dim, options.norm));
  }
  if (*options.rotary.dim) tables_ = RotaryTables(options.rotary, *options.rotary.dim);
  proj = register_module("proj", Linear({.in_features = options.heads * head_dim,
                                         .out_features = options.hidden_size,
                                         .bias = options.bias}));
}

// What rotary would say of qkv and of the tables, in words of x.
void AttentionImpl::check_input(const Tensor& x, const Packing& packing) const {
  TORCH_CHECK(x.dim() == (packing.cu_seqlens ? 2 : 3), "Attention: x: expected ",
              packing.cu_seqlens ? "[tokens, hidden_size] beside cu_seqlens"
                                 : "[batch, sequence, hidden_size]",
              ", not ", x.sizes());
  if (!tables_.cos.defined() || packing.positions || packing.cu_seqlens) return;
  TORCH_CHECK(x.size(1) <= tables_.cos.size(0), "Attention: x: expected a sequence of at most ",
              tables_.cos.size(0), ", which is max_positions, not ", x.size(1));
}

AttentionImpl::Heads AttentionImpl::split(const Tensor& qkv) const {
  const int64_t group = options.heads / options.kv_heads;
  const Tensor packed = qkv.unflatten(-1, {options.kv_heads, group + 2, options.head_dim});
  const auto parts = packed.split_with_sizes({group, 1, 1}, -2);
  return {.q = parts[0].flatten(-3, -2), .k = parts[1].squeeze(-2), .v = parts[2].squeeze(-2)};
}

// In one pass over the packed qkv, unless q and k have norms.
AttentionImpl::Heads AttentionImpl::rotate(const Tensor& qkv, const Packing& packing) {
  const std::string layout = packing.cu_seqlens ? "thd" : "bshd";
  if (tables_.cos.defined()) tables_.place(qkv.device());
  if (q_norm) {
    const Heads heads = split(qkv);
    const Tensor q = q_norm(heads.q), k = k_norm(heads.k);
    if (!tables_.cos.defined()) return {.q = q, .k = k, .v = heads.v};
    const auto [q_turned, k_turned] =
        ops::rotary_pair(q, k, tables_.cos, tables_.sin, packing.positions,
                         /*interleaved=*/false, layout, packing.cu_seqlens);
    return {.q = q_turned, .k = k_turned, .v = heads.v};
  }
  if (!tables_.cos.defined()) return split(qkv);
  const auto [q, k, v] = ops::qkv_rotary_split(qkv, tables_.cos, tables_.sin, options.heads,
                                               options.kv_heads, packing.positions,
                                               /*interleaved=*/false, layout, packing.cu_seqlens);
  return {.q = q, .k = k, .v = v};
}

Tensor AttentionImpl::attend(const Tensor& qkv, const Packing& packing) {
  const Heads heads = rotate(qkv, packing);
  const ops::AttentionOptions attention{.causal = options.causal,
                                        .window = options.window,
                                        .cu_seqlens_q = packing.cu_seqlens,
                                        .cu_seqlens_k = packing.cu_seqlens,
                                        .max_seqlen_q = packing.max_seqlen,
                                        .max_seqlen_k = packing.max_seqlen};
  const auto run = [attention](const variable_list& parts) -> variable_list {
    return {std::get<0>(ops::attention(parts[0], parts[1], parts[2], attention))};
  };
  const variable_list parts = {heads.q, heads.k, heads.v};
  const variable_list context = options.recompute ? recompute({.run = run}, parts) : run(parts);
  return proj(context[0].flatten(-2));
}

Tensor attend_sequence_first(const Tensor& q, const Tensor& k, const Tensor& v,
                             const CoreAttentionOptions& options) {
  const auto out = ops::attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1),
                                  {.causal = options.causal,
                                   .scale = options.scale,
                                   .window = options.window,
                                   .dropout = options.dropout});
  return std::get<0>(out).transpose(0, 1).flatten(-2);
}

Tensor AttentionImpl::forward(const Tensor& x, const Packing& packing) {
  check_input(x, packing);
  return attend(layernorm_qkv(x), packing);
}

std::tuple<Tensor, Tensor> AttentionImpl::forward_residual(const Tensor& x, const Tensor& residual,
                                                           const Packing& packing, double dropout) {
  check_input(x, packing);
  auto [qkv, sum] = layernorm_qkv->forward_residual(x, residual, dropout);
  return {attend(qkv, packing), sum};
}

}  // namespace redline::layers
