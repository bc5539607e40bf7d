#include "redline/ops/attention_plain.h"

#include <ATen/SDPBackend.h>

#include "redline/core/watch.h"
#include "redline/ops/below_autograd.h"
#include "redline/ops/direct_view.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using Backend = at::SDPBackend;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// [batch, heads, length, head_dim], as torch's kernels read them.
struct Heads {
  Tensor q, k, v;
};

bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

// [batch, heads, length, head_dim] of [batch, length, heads, head_dim], and back.
Tensor swapped(const Tensor& tensor) { return swapped_directly(tensor, 1, 2); }

// --- torch's kernels ----------------------------------------------------------------------------

Backend choose(const Heads& heads, const PlainAttention& options) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const bool grouped = heads.q.sym_size(1) != heads.k.sym_size(1);
  return static_cast<Backend>(at::_fused_sdp_choice(heads.q, heads.k, heads.v, /*attn_mask=*/{},
                                                    /*dropout_p=*/0.0, options.causal,
                                                    options.scale, grouped));
}

// Tells a watcher which of torch's kernels will run.
void note_torch(Backend backend, const Tensor& q) {
  if (backend == Backend::math) {
    note_fallback({"attention", "q", "use a 16-bit dtype and a head_dim that torch's kernels have"},
                  "torch has no fused kernel for ", c10::str(q.scalar_type()), " heads of ",
                  q.size(-1), ": products and a softmax that hold all scores");
  } else {
    note_choice("torch's fused kernel: no option asks for more");
  }
}

// Whether run_forward() has the kernel. Torch pads heads for flash on CUDA, outside of it.
bool is_fused(Backend backend, const Heads& heads) {
  switch (backend) {
    case Backend::flash_attention:
      return !heads.q.is_cuda() || (heads.q.size(3) % 8 == 0 && heads.v.size(3) % 8 == 0);
    case Backend::efficient_attention:
    case Backend::cudnn_attention:
      return heads.q.is_cuda();
    default:
      return false;
  }
}

// {out, log_sum_exp, what else the backward reads}; the second is empty unless `trained`.
variable_list run_forward(Backend backend, const Heads& heads, const PlainAttention& options,
                          bool trained) {
  const auto& [q, k, v] = heads;
  const auto& [causal, scale] = options;
  if (backend == Backend::efficient_attention) {
    const auto [out, log_sum_exp, seed, offset] = at::_scaled_dot_product_efficient_attention(
        q, k, v, /*attn_bias=*/{}, trained, /*dropout_p=*/0.0, causal, scale);
    return {out, log_sum_exp, seed, offset};
  }
  if (!q.is_cuda()) {
    const auto [out, log_sum_exp] = at::_scaled_dot_product_flash_attention_for_cpu(
        q, k, v, /*dropout_p=*/0.0, causal, /*attn_mask=*/{}, scale);
    return {out, log_sum_exp};
  }
  const auto [out, log_sum_exp, bounds_q, bounds_k, max_q, max_k, seed, offset, mask] =
      backend == Backend::cudnn_attention
          ? at::_scaled_dot_product_cudnn_attention(q, k, v, /*attn_bias=*/{}, trained,
                                                    /*dropout_p=*/0.0, causal,
                                                    /*return_debug_mask=*/false, scale)
          : at::_scaled_dot_product_flash_attention(q, k, v, /*dropout_p=*/0.0, causal,
                                                    /*return_debug_mask=*/false, scale);
  return {out, log_sum_exp, seed, offset, bounds_q, bounds_k};
}

// The gradients of q, k and v; `kept` is what run_forward() gave.
Heads run_backward(Backend backend, const Tensor& y_grad, const Heads& heads,
                   const variable_list& kept, const PlainAttention& options,
                   std::array<bool, 4> wanted) {
  const auto& [q, k, v] = heads;
  const auto& [causal, scale] = options;
  const Tensor &out = kept[0], &log_sum_exp = kept[1];
  if (backend == Backend::efficient_attention) {
    auto [q_grad, k_grad, v_grad, _] = at::_scaled_dot_product_efficient_attention_backward(
        y_grad, q, k, v, /*attn_bias=*/{}, out, log_sum_exp, kept[2], kept[3], /*dropout_p=*/0.0,
        wanted, causal, scale);
    return {q_grad, k_grad, v_grad};
  }
  if (!q.is_cuda()) {
    auto [q_grad, k_grad, v_grad] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        y_grad, q, k, v, out, log_sum_exp, /*dropout_p=*/0.0, causal, /*attn_mask=*/{}, scale);
    return {q_grad, k_grad, v_grad};
  }
  auto [q_grad, k_grad, v_grad] =
      backend == Backend::cudnn_attention
          ? at::_scaled_dot_product_cudnn_attention_backward(
                y_grad, q, k, v, out, log_sum_exp, kept[2], kept[3], /*attn_bias=*/{}, kept[4],
                kept[5], q.size(2), k.size(2), /*dropout_p=*/0.0, causal, scale)
          : at::_scaled_dot_product_flash_attention_backward(
                y_grad, q, k, v, out, log_sum_exp, kept[4], kept[5], q.size(2), k.size(2),
                /*dropout_p=*/0.0, causal, kept[2], kept[3], scale);
  return {q_grad, k_grad, v_grad};
}

// --- derivative ---------------------------------------------------------------------------------

struct PlainNode {
  Backend backend;
  PlainAttention options;
  bool is_out_first;  // what is kept of out is the node's own output

  void save(AutogradContext* ctx) const {
    ctx->saved_data["node"] =
        static_cast<int64_t>(backend) << 2 | is_out_first << 1 | static_cast<int>(options.causal);
    if (options.scale) ctx->saved_data["scale"] = *options.scale;
  }
  static PlainNode from(AutogradContext* ctx) {
    const int64_t packed = ctx->saved_data["node"].toInt();
    const auto scale = ctx->saved_data.find("scale");
    const bool given = scale != ctx->saved_data.end();
    return {static_cast<Backend>(packed >> 2),
            {(packed & 1) != 0, given ? std::optional(scale->second.toDouble()) : std::nullopt},
            (packed & 2) != 0};
  }
};

struct PlainFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Heads& heads, PlainNode node) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list results = run_forward(node.backend, heads, node.options, /*trained=*/true);
    const Tensor y = swapped(results[0]);
    node.is_out_first = y.is_contiguous();
    variable_list saved = {q, k, v};
    saved.insert(saved.end(), results.begin(), results.end());
    if (node.is_out_first) saved[3] = y;  // so that a write to it is noticed
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    node.save(ctx);
    return node.is_out_first ? y : y.contiguous();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(5);
    const BelowAutograd below(grads);
    const auto swap = [](const Tensor& tensor) {
      return is_private(tensor) ? swapped(tensor) : tensor.transpose(1, 2);
    };
    const PlainNode node = PlainNode::from(ctx);
    variable_list kept(saved.begin() + 3, saved.end());
    if (node.is_out_first) kept[0] = swap(kept[0]);
    const Heads in = run_backward(
        node.backend, swap(grads[0]), {swap(saved[0]), swap(saved[1]), swap(saved[2])}, kept,
        node.options,
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2), false});
    variable_list out(5);
    for (size_t i = 0; const Tensor* grad : {&in.q, &in.k, &in.v}) {
      if (ctx->needs_input_grad(i) && grad->defined()) out[i] = swap(*grad);
      ++i;
    }
    return out;
  }
};

// --- torch's composition ------------------------------------------------------------------------

Tensor compose(const Tensor& q, const Tensor& k, const Tensor& v, const PlainAttention& options) {
  const Heads heads = {q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)};
  if (watcher() != nullptr && !q.is_meta() && !q.key_set().has(c10::DispatchKey::Python)) {
    note_torch(choose(heads, options), q);
  }
  const bool grouped = q.sym_size(2) != k.sym_size(2);
  return at::scaled_dot_product_attention(heads.q, heads.k, heads.v, /*attn_mask=*/{},
                                          /*dropout_p=*/0.0, options.causal, options.scale, grouped)
      .transpose(1, 2)
      .contiguous();  // torch's math kernel lays the heads first
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const PlainAttention& options) {
  for (const Tensor* tensor : {&q, &k, &v}) {
    const bool kept = tensor->is_inference() && at::GradMode::is_enabled();  // torch refuses it
    if (!is_plain(*tensor) || has_tangent(*tensor) || kept) return compose(q, k, v, options);
  }
  if (!is_unobserved()) return compose(q, k, v, options);
  const Heads heads = {swapped(q), swapped(k), swapped(v)};
  const bool trained =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  if (trained) heads.q.set_requires_grad(true);  // torch's choice asks for it
  const Backend backend = choose(heads, options);
  if (!is_fused(backend, heads)) return compose(q, k, v, options);
  note_torch(backend, q);
  if (trained) {
    return StrictNode<PlainFunction>::apply(q, k, v, heads, PlainNode{backend, options, false});
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return swapped(run_forward(backend, heads, options, /*trained=*/false)[0]).contiguous();
}

}  // namespace

Tensor repeat_heads(const Tensor& tensor, const c10::SymInt& heads, int64_t axis) {
  if (tensor.sym_size(axis) == heads) return tensor;
  return at::repeat_interleave_symint(tensor, heads / tensor.sym_size(axis), axis);
}

Tensor attend_plain(const Tensor& q, const Tensor& k, const Tensor& v,
                    const PlainAttention& options) {
  // Float32 on CUDA: torch's only kernel for fewer key heads keeps all probabilities.
  const bool repeats = q.is_cuda() && q.scalar_type() == at::kFloat;
  if (!repeats) return attend(q, k, v, options);
  const c10::SymInt heads = q.sym_size(2);
  return attend(q, repeat_heads(k, heads, 2), repeat_heads(v, heads, 2), options);
}

}  // namespace redline::ops
