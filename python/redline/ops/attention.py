"""Scaled dot product attention."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)
from redline.ops._options import stated

_ops = torch.ops.redline


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_k_padded: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    rng_state: Tensor | None = None,
    deterministic: bool = False,
    return_log_sum_exp: bool = False,
    return_max_logit: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale * q k^T) v, per head.

    q: [batch, queries, heads, head_dim]; k, v: [batch, keys, kv_heads, head_dim], where kv_heads
    divides heads; or packed, [tokens, heads, head_dim] with cu_seqlens [sequences + 1]. `causal` is
    aligned at the bottom right; `window` is (keys before, keys after) that diagonal, -1 for all;
    `sink` [heads] is a logit in the denominator. Returns out in q's layout, and after it, where
    asked for, log_sum_exp [batch, heads, queries] and max_logit [heads].

    Plain and causal attention run on torch's best kernel for the device, whose CUDA backward gives
    other bits in every run unless `deterministic`. Everything else runs a slow reference path that
    holds the scores in float32. Dropout is not built.
    """
    options = stated(
        causal=causal,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        cu_seqlens_q_padded=cu_seqlens_q_padded,
        cu_seqlens_k_padded=cu_seqlens_k_padded,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        sink=sink,
        softcap=softcap,
        rng_state=rng_state,
        deterministic=deterministic,
        return_log_sum_exp=return_log_sum_exp,
        return_max_logit=return_max_logit,
        window=None if window is None else list(window),
        dropout=dropout or None,
    )
    out, log_sum_exp, max_logit = _ops.attention(q, k, v, **options)
    extra = (log_sum_exp,) * return_log_sum_exp + (max_logit,) * return_max_logit
    return (out, *extra) if extra else out
