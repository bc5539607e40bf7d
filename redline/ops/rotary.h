// Rotary position embedding of x, of q and k, or of the q and k inside packed q, k and v (formulas:
// kernels/rotary.h). cos and sin are float32 [positions, rotary_dim / 2], rotary_dim at most
// head_dim. Kept for backward: the tables and the positions. Refuses what does not fit with
// redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// x: [batch, seq, heads, head_dim] (bshd), [seq, batch, heads, head_dim] (sbhd), or
// [tokens, heads, head_dim] (thd, which needs positions or cu_seqlens). positions: [seq] or
// [batch, seq], for thd [tokens], int64 or int32. Without them each sequence counts from 0.
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                  const std::optional<at::Tensor>& positions = {}, bool interleaved = false,
                  std::string_view layout = "bshd",
                  const std::optional<at::Tensor>& cu_seqlens = {});

// The same of q and k [..., heads, head_dim] in one launch: sizes and dtype of both are the same
// but for the heads.
std::tuple<at::Tensor, at::Tensor> rotary_pair(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& cos, const at::Tensor& sin,
                                               const std::optional<at::Tensor>& positions = {},
                                               bool interleaved = false,
                                               std::string_view layout = "bshd",
                                               const std::optional<at::Tensor>& cu_seqlens = {});

// qkv: as x with the last two axes packed: per key head, its q heads, then k, then v. Returns the
// same packing with q and k turned and v copied.
at::Tensor qkv_rotary(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                      int64_t heads, int64_t kv_heads,
                      const std::optional<at::Tensor>& positions = {}, bool interleaved = false,
                      std::string_view layout = "bshd",
                      const std::optional<at::Tensor>& cu_seqlens = {});

// qkv_rotary with q [..., heads, head_dim] and k and v [..., kv_heads, head_dim] written apart,
// where attention reads them: nothing is copied in between, nor are their gradients in backward.
std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_rotary_split(
    const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, int64_t heads,
    int64_t kv_heads, const std::optional<at::Tensor>& positions = {}, bool interleaved = false,
    std::string_view layout = "bshd", const std::optional<at::Tensor>& cu_seqlens = {});

}  // namespace redline::ops
