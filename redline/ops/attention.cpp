#include "redline/ops/attention.h"

#include <cmath>

#include "redline/ops/attention_plain.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/softmax.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op_name = "attention";

// --- what is asked for --------------------------------------------------------------------------

void check_cu_seqlens(const char* name, const OptionalTensor& bounds, const OptionalTensor& like) {
  if (!bounds) return;
  const bool integer = bounds->scalar_type() == at::kInt || bounds->scalar_type() == at::kLong;
  TORCH_CHECK(integer && bounds->dim() == 1 && bounds->sym_size(0) >= 2, op_name, ": ", name,
              ": expected [sequences + 1] int32 or int64, not ", bounds->sym_sizes(), " ",
              bounds->scalar_type());
  TORCH_CHECK(!like || bounds->sym_sizes() == like->sym_sizes(), op_name, ": ", name, ": expected ",
              like->sym_sizes(), ", not ", bounds->sym_sizes());
}

void check_packing(const Tensor& q, const AttentionOptions& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  TORCH_CHECK(packed == options.cu_seqlens_k.has_value(), op_name, ": cu_seqlens_",
              packed ? "k" : "q", ": expected beside cu_seqlens_", packed ? "q" : "k");
  TORCH_CHECK(q.dim() == (packed ? 3 : 4), op_name, ": q: expected ",
              packed ? "[tokens, heads, head_dim] beside cu_seqlens"
                     : "[batch, queries, heads, head_dim], or cu_seqlens beside packed tokens",
              ", not ", q.sym_sizes());
  check_cu_seqlens("cu_seqlens_q", options.cu_seqlens_q, {});
  check_cu_seqlens("cu_seqlens_k", options.cu_seqlens_k, options.cu_seqlens_q);
  check_cu_seqlens("cu_seqlens_q_padded", options.cu_seqlens_q_padded, options.cu_seqlens_q);
  check_cu_seqlens("cu_seqlens_k_padded", options.cu_seqlens_k_padded, options.cu_seqlens_q);
  TORCH_CHECK(packed || (!options.cu_seqlens_q_padded && !options.cu_seqlens_k_padded), op_name,
              ": cu_seqlens_q_padded: expected beside cu_seqlens_q");
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(at::isFloatingType(q.scalar_type()), op_name, ": q: expected a floating dtype, not ",
              q.scalar_type());
  check_devices(op_name, q, {{"k", k}, {"v", v}});
  for (const auto& [name, tensor] : {std::pair{"k", k}, std::pair{"v", v}}) {
    TORCH_CHECK(tensor.dim() == q.dim(), op_name, ": ", name, ": expected ", q.dim(),
                " dimensions as q has, not ", tensor.sym_sizes());
    TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), op_name, ": ", name, ": expected ",
                q.scalar_type(), ", not ", tensor.scalar_type());
    TORCH_CHECK(q.dim() == 3 || tensor.sym_size(0) == q.sym_size(0), op_name, ": ", name,
                ": expected a batch of ", q.sym_size(0), ", not ", tensor.sym_size(0));
  }
  TORCH_CHECK(k.sym_size(-1) == q.sym_size(-1), op_name, ": k: expected a head_dim of ",
              q.sym_size(-1), ", not ", k.sym_size(-1));
  TORCH_CHECK(v.sym_size(-2) == k.sym_size(-2) && v.sym_size(-3) == k.sym_size(-3), op_name,
              ": v: expected the keys and heads of k ", k.sym_sizes(), ", not ", v.sym_sizes());
  TORCH_CHECK(k.sym_size(-2) > 0 && q.sym_size(-2) % k.sym_size(-2) == 0, op_name,
              ": k: expected kv_heads that divide ", q.sym_size(-2), " heads, not ",
              k.sym_size(-2));
}

void check_options(const Tensor& q, const AttentionOptions& options) {
  TORCH_CHECK(options.dropout == 0, op_name, ": dropout: expected 0, not ", options.dropout,
              "; dropout on probabilities is not built");
  TORCH_CHECK(!options.rng_state, op_name, ": rng_state: expected none, dropout is not built");
  TORCH_CHECK(!options.softcap || *options.softcap > 0, op_name,
              ": softcap: expected more than 0, not ", options.softcap.value_or(0));
  if (options.window) {
    const auto [before, after] = *options.window;
    TORCH_CHECK(before >= -1 && after >= -1, op_name,
                ": window: expected keys before and after, -1 for all, not {", before, ", ", after,
                "}");
  }
  if (options.sink) {
    TORCH_CHECK(options.sink->dim() == 1 && options.sink->sym_size(0) == q.sym_size(-2), op_name,
                ": sink: expected [", q.sym_size(-2), "], not ", options.sink->sym_sizes());
  }
}

// Keys that a query may see before and after its diagonal; -1: all.
struct Window {
  int64_t before = -1, after = -1;
  bool bounded() const { return before >= 0 || after >= 0; }
};

Window window_of(const AttentionOptions& options) {
  Window window;
  if (options.window) window = {(*options.window)[0], (*options.window)[1]};
  if (options.causal) window.after = 0;
  return window;
}

double scale_of(const Tensor& q, const AttentionOptions& options) {
  if (options.scale) return *options.scale;
  return 1.0 / std::sqrt(static_cast<double>(q.sym_size(-1).guard_int(__FILE__, __LINE__)));
}

// --- torch's kernels ----------------------------------------------------------------------------

// The option that torch's kernels do not serve, and what to do without it; nothing where they do.
std::optional<Fallback> unserved(const Tensor& q, const Tensor& k,
                                 const AttentionOptions& options) {
  const auto option = [](const char* name, const char* instead) {
    return Fallback{op_name, name, instead};
  };
  if (options.cu_seqlens_q) return option("cu_seqlens_q", "give a batch of padded sequences");
  if (options.sink) return option("sink", "give none");
  if (options.softcap) return option("softcap", "give none");
  if (options.return_log_sum_exp) return option("return_log_sum_exp", "leave it false");
  if (options.return_max_logit) return option("return_max_logit", "leave it false");
  if (options.deterministic && q.is_cuda()) return option("deterministic", "leave it false");
  const Window window = window_of(options);
  if (window.before >= 0 || window.after > 0) return option("window", "give none");
  // One query sees every key; torch's causal mask is aligned at the top left.
  const bool aligned = window.after < 0 || q.sym_size(1) == k.sym_size(1) || q.sym_size(1) == 1;
  if (!aligned) return option("causal", "give as many queries as keys, or one");
  return std::nullopt;
}

// --- the reference path -------------------------------------------------------------------------

// Where each token of a packed tensor belongs.
struct Places {
  Tensor sequence, index, length, inside;  // [tokens]
};

Places places_of(const Tensor& tokens, const Tensor& bounds, const OptionalTensor& padded) {
  const Tensor cumulative = bounds.to(at::kLong);
  const Tensor lengths = at::diff(cumulative);
  const Tensor starts = (padded ? padded->to(at::kLong) : cumulative).slice(0, 0, -1).contiguous();
  const Tensor token = at::arange(tokens.sym_size(0), starts.options());
  const Tensor sequence =
      at::searchsorted(starts, token, /*out_int32=*/false, /*right=*/true).sub(1).clamp_min(0);
  const Tensor index = token - starts.index_select(0, sequence);
  const Tensor length = lengths.index_select(0, sequence);
  return {sequence, index, length, index.ge(0).logical_and(index < length)};
}

// bool [queries, keys], true where `window` excludes; `diagonal` is each query's last key,
// causally.
Tensor excluded_by(const Window& window, const Tensor& diagonal, const Tensor& key) {
  const Tensor distance = key.unsqueeze(0) - diagonal.unsqueeze(1);
  Tensor excluded = at::zeros_like(distance, at::kBool);
  if (window.after >= 0) excluded = excluded.logical_or(distance > window.after);
  if (window.before >= 0) excluded = excluded.logical_or(distance < -window.before);
  return excluded;
}

Tensor packed_mask(const Tensor& q, const Tensor& k, const AttentionOptions& options) {
  const Places from = places_of(q, *options.cu_seqlens_q, options.cu_seqlens_q_padded);
  const Places to = places_of(k, *options.cu_seqlens_k, options.cu_seqlens_k_padded);
  const Tensor key_lengths = at::diff(options.cu_seqlens_k->to(at::kLong));
  const Tensor shift = key_lengths.index_select(0, from.sequence) - from.length;
  const Tensor foreign = from.sequence.unsqueeze(1) != to.sequence.unsqueeze(0);
  const Tensor outside = from.inside.logical_and(from.index.ge(0))
                             .logical_not()
                             .unsqueeze(1)
                             .logical_or(to.inside.logical_not().unsqueeze(0));
  return excluded_by(window_of(options), from.index + shift, to.index)
      .logical_or(foreign)
      .logical_or(outside);
}

Tensor index_mask(const Tensor& q, const Tensor& k, const AttentionOptions& options) {
  const auto integers = q.options().dtype(at::kLong);
  const c10::SymInt queries = q.sym_size(1), keys = k.sym_size(1);
  const Tensor diagonal = at::arange(queries, integers) + (keys - queries);
  return excluded_by(window_of(options), diagonal, at::arange(keys, integers));
}

// log(sum(e^scores) [+ e^sink]) over the keys that are left: [batch, heads, queries].
Tensor log_sum_exp_of(const Tensor& scores, const OptionalTensor& sink) {
  const Tensor lse = at::logsumexp(scores, {-1});
  if (!sink) return lse;
  return at::logaddexp(lse, sink->to(lse.scalar_type()).view_symint({1, sink->sym_size(0), 1}));
}

// [batch, length, heads, head_dim] to float32 (float64 stays) [batch, heads, length, head_dim].
Tensor wide_heads(const Tensor& tensor, const c10::SymInt& heads) {
  return repeat_heads(tensor.transpose(1, 2).to(accumulation_type(tensor)), heads, 1);
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

// q, k, v with a batch axis; `mask` or, without one, the window's indices exclude.
Results attend_by_reference(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask,
                            const AttentionOptions& options) {
  const Window window = window_of(options);
  const c10::SymInt heads = q.sym_size(2);
  double scale = scale_of(q, options);
  Tensor scores = at::matmul(wide_heads(q, heads), wide_heads(k, heads).transpose(-1, -2));
  if (options.softcap) {
    scores = at::tanh(scores * (scale / *options.softcap)) * *options.softcap;
    scale = 1;
  }
  const bool statistics = options.return_log_sum_exp || options.return_max_logit;
  if (!mask && (window.after > 0 || (window.bounded() && statistics))) {
    mask = index_mask(q, k, options);
  }
  SoftmaxOptions by_index{.scale = scale};
  if (!mask) {
    by_index.causal = window.after == 0;
    if (window.before >= 0) by_index.window = window.before + 1;
  }
  const Tensor probabilities = softmax(scores, mask, options.sink, by_index);
  const Tensor out = at::matmul(probabilities, wide_heads(v, heads)).to(q.scalar_type());
  Tensor log_sum_exp, max_logit;
  if (statistics) {
    Tensor seen = scores * scale;
    if (mask) seen = seen.masked_fill(*mask, -INFINITY);
    if (options.return_log_sum_exp) log_sum_exp = log_sum_exp_of(seen, options.sink);
    if (options.return_max_logit) max_logit = seen.detach().amax({0, 2, 3});
  }
  return {out.transpose(1, 2).contiguous(), log_sum_exp, max_logit};
}

// The stock op's rule under autocast: q, k and v in autocast's dtype. The reference path then keeps
// its own dtypes.
Tensor autocast(const Tensor& tensor) {
  const auto device = tensor.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) {
    return tensor;  // a meta tensor's device has no autocast
  }
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

Results run(const Tensor& query, const Tensor& key, const Tensor& value,
            const AttentionOptions& options) {
  check_packing(query, options);
  const Tensor q = autocast(query), k = autocast(key), v = autocast(value);
  check_shapes(q, k, v);
  check_options(q, options);
  const c10::impl::ExcludeDispatchKeyGuard off(c10::autocast_dispatch_keyset);
  const auto reason = unserved(q, k, options);
  if (!reason) {
    const bool causal = window_of(options).after == 0 && q.sym_size(1) != 1;
    return {attend_plain(q, k, v, {causal, options.scale}), Tensor(), Tensor()};
  }
  note_fallback(*reason,
                "torch's fused kernels do not serve it: products and a masked softmax that "
                "hold all scores");
  if (!options.cu_seqlens_q) return attend_by_reference(q, k, v, {}, options);
  const auto [out, log_sum_exp, max_logit] = attend_by_reference(
      q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), packed_mask(q, k, options), options);
  return {out.squeeze(0), options.return_log_sum_exp ? log_sum_exp.squeeze(0) : log_sum_exp,
          max_logit};
}

// In the form of the schema.
Results composed(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                 std::optional<double> scale, at::OptionalIntArrayRef window,
                 const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                 const OptionalTensor& cu_seqlens_q_padded,
                 const OptionalTensor& cu_seqlens_k_padded,
                 std::optional<c10::SymInt> /*max_seqlen_q*/,
                 std::optional<c10::SymInt> /*max_seqlen_k*/, const OptionalTensor& sink,
                 std::optional<double> softcap, double dropout, const OptionalTensor& rng_state,
                 bool deterministic, bool return_log_sum_exp, bool return_max_logit) {
  AttentionOptions options{.causal = causal,
                           .scale = scale,
                           .cu_seqlens_q = cu_seqlens_q,
                           .cu_seqlens_k = cu_seqlens_k,
                           .cu_seqlens_q_padded = cu_seqlens_q_padded,
                           .cu_seqlens_k_padded = cu_seqlens_k_padded,
                           .sink = sink,
                           .softcap = softcap,
                           .dropout = dropout,
                           .rng_state = rng_state,
                           .deterministic = deterministic,
                           .return_log_sum_exp = return_log_sum_exp,
                           .return_max_logit = return_max_logit};
  if (window) options.window = {(*window)[0], (*window)[1]};
  return run(q, k, v, options);
}

std::optional<c10::SymInt> symbolic(const std::optional<int64_t>& number) {
  return number ? std::optional<c10::SymInt>(*number) : std::nullopt;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const AttentionOptions& options) {
  static const auto op = find_op<decltype(composed)>("redline::attention");
  at::OptionalIntArrayRef window;
  if (options.window) window = at::IntArrayRef(options.window->data(), 2);
  return op.call(q, k, v, options.causal, options.scale, window, options.cu_seqlens_q,
                 options.cu_seqlens_k, options.cu_seqlens_q_padded, options.cu_seqlens_k_padded,
                 symbolic(options.max_seqlen_q), symbolic(options.max_seqlen_k), options.sink,
                 options.softcap, options.dropout, options.rng_state, options.deterministic,
                 options.return_log_sum_exp, options.return_max_logit);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, *, bool causal=False, float? scale=None, "
      "int[2]? window=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "Tensor? cu_seqlens_q_padded=None, Tensor? cu_seqlens_k_padded=None, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? sink=None, "
      "float? softcap=None, float dropout=0.0, Tensor? rng_state=None, "
      "bool deterministic=False, bool return_log_sum_exp=False, bool return_max_logit=False) "
      "-> (Tensor out, Tensor log_sum_exp, Tensor max_logit)");
}

// A composition of differentiable ops, or our node of autograd: tracing sees ops alone.
TORCH_LIBRARY_IMPL(redline, CompositeImplicitAutograd, m) { m.impl("attention", composed); }
TORCH_LIBRARY_IMPL(redline, FuncTorchBatched, m) { refuse_vmap(m, {"attention"}); }

}  // namespace redline::ops
