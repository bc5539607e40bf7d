# Over budget: parameters: the masks, the packing and the scores' options of Transformer Engine.
"""Core attention in Transformer Engine's words: its layouts, its names of masks, its packing."""

import torch

from redline import ops

LAYOUTS = ("sbhd", "bshd", "thd")
MASKS = (
    "no_mask",
    "causal",
    "causal_bottom_right",
    "padding",
    "padding_causal",
    "padding_causal_bottom_right",
    "arbitrary",
)
UPPER_LEFT = ("causal", "padding_causal")


def core_attention(
    q,
    k,
    v,
    *,
    layout="sbhd",
    mask="causal",
    attention_mask=None,
    bias=None,
    dropout=0.0,
    packing=None,
    window=None,
    **options,
):
    """softmax(scale q k^T + bias) v per head, in q's layout with the heads merged.

    layout: sbhd (q [s, b, heads, d]), bshd, or thd ([tokens, heads, d], with packing). mask: one
    of `MASKS`; causal counts from the upper left corner, *_bottom_right from the lower right one.
    attention_mask: bool, True where excluded: [b, 1, 1, s] for the padding masks, for queries and
    keys of different lengths a pair of these, and whatever broadcasts to [b, heads, queries, keys]
    for arbitrary. packing: cu_seqlens_q and _k, *_padded and max_seqlen_* of `ops.attention`.
    bias: [b or 1, heads or 1, queries, keys], added to the scaled scores. window, scale, sink,
    deterministic, return_max_logit: as in `ops.attention`, and so is what runs. A bias, dropout, an
    arbitrary mask, and causal with fewer or more queries than keys run a composition that holds
    the scores in float32. A query that sees no key gives 0.

    >>> q = k = v = torch.randn(16, 2, 4, 32)
    >>> core_attention(q, k, v).shape
    torch.Size([16, 2, 128])
    """
    _check(layout, mask, packing, bias, dropout)
    options |= {"window": window, "causal": "causal" in mask}
    if layout == "thd":
        return _merged(ops.attention(q, k, v, **packing, **options))
    if layout == "sbhd":
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    composed = bias is not None or dropout or mask == "arbitrary"
    if composed or _corners_differ(q, k, mask, attention_mask):
        out = _by_scores(q, k, v, mask, attention_mask, bias, dropout, options)
    elif mask.startswith("padding"):
        out = _padded(q, k, v, attention_mask, packing, options)
    else:
        out = ops.attention(q, k, v, **options)
    return _merged(out, transpose=layout == "sbhd")


def _check(layout, mask, packing, bias, dropout):
    if layout not in LAYOUTS:
        raise ValueError(f"core_attention: layout: expected {' '.join(LAYOUTS)}, not {layout}")
    if mask not in MASKS:
        raise ValueError(f"core_attention: mask: expected {' '.join(MASKS)}, not {mask}")
    if layout != "thd":
        return
    if not mask.startswith("padding"):
        raise ValueError(f"core_attention: mask: expected a padding mask beside thd, not {mask}")
    if not packing or packing.get("cu_seqlens_q") is None:
        raise ValueError("core_attention: packing: expected cu_seqlens_q and cu_seqlens_k with thd")
    if bias is not None or dropout:
        raise NotImplementedError(
            "core_attention: bias and dropout beside thd are not built: sbhd and bshd take them"
        )


def _corners_differ(q, k, mask, attention_mask):
    """Whether the upper left and the lower right corner, which ops.attention counts from, do."""
    pair = isinstance(attention_mask, tuple | list)
    return mask in UPPER_LEFT and (q.shape[1] != k.shape[1] or (pair and "padding" in mask))


def _merged(out, transpose=False):
    """[..., heads, d] to [..., heads d], of `out` or of the first of its parts."""
    out, *extra = out if isinstance(out, tuple) else (out,)
    out = (out.transpose(0, 1) if transpose else out).flatten(-2)
    return (out, *extra) if extra else out


def _sides(attention_mask, name):
    """(excluded queries [b, s_q], excluded keys [b, s_k]) of one padding mask or a pair."""
    if attention_mask is None:
        raise ValueError(f"core_attention: attention_mask: expected a mask beside {name}")
    pair = attention_mask if isinstance(attention_mask, tuple | list) else (attention_mask,) * 2
    return [side.flatten(1) for side in pair]


def _lengths(excluded):
    """(cumulative lengths, storage offsets) [b + 1] of sequences that begin at the first place."""
    batch, places = excluded.shape
    lengths = (~excluded).sum(1)
    cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return cumulative, torch.arange(batch + 1, device=excluded.device) * places


def _padded(q, k, v, attention_mask, packing, options):
    """Batches of sequences with padding behind them, as packed ones with gaps between."""
    if packing is None or packing.get("cu_seqlens_q") is None:
        queries, keys = _sides(attention_mask, "a padding mask")
        (cu_q, starts_q), (cu_k, starts_k) = _lengths(queries), _lengths(keys)
        packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        packing |= {"cu_seqlens_q_padded": starts_q, "cu_seqlens_k_padded": starts_k}
    else:
        packing = dict(packing)
        for side, tensor in (("q", q), ("k", k)):
            batch, places = tensor.shape[:2]
            starts = torch.arange(batch + 1, device=tensor.device) * places
            packing[f"cu_seqlens_{side}_padded"] = starts
    out = ops.attention(*(x.flatten(0, 1) for x in (q, k, v)), **packing, **options)
    out, *extra = out if isinstance(out, tuple) else (out,)
    out = out.unflatten(0, q.shape[:2])
    return (out, *extra) if extra else out


def _by_scores(q, k, v, mask, attention_mask, bias, dropout, options):
    """The composition: scores, softmax, dropout, product; float64 stays, all else is float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    scale = options.get("scale") or q.shape[-1] ** -0.5
    q_heads, k_heads, v_heads = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    k_heads, v_heads = (x.repeat_interleave(group, 1) for x in (k_heads, v_heads))
    scores = torch.matmul(q_heads, k_heads.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    excluded = _excluded(q, k, mask, attention_mask, options)
    probabilities = ops.softmax(scores, excluded, sink=options.get("sink"))
    dropped = torch.nn.functional.dropout(probabilities, dropout)
    out = torch.matmul(dropped, v_heads).to(q.dtype).transpose(1, 2)
    if options.get("return_max_logit"):
        return out, scores.detach().masked_fill(excluded, -torch.inf).amax((0, 2, 3))
    return out


def _excluded(q, k, mask, attention_mask, options):
    """bool, broadcast to [b, heads, queries, keys]: what the mask and the window exclude."""
    queries, keys = q.shape[1], k.shape[1]
    lengths_q = lengths_k = None
    if mask == "arbitrary":
        if attention_mask is None:
            raise ValueError("core_attention: attention_mask: expected a mask beside arbitrary")
        excluded = attention_mask
    elif mask.startswith("padding"):
        outside_q, outside_k = _sides(attention_mask, mask)
        excluded = outside_q[:, None, :, None] | outside_k[:, None, None, :]
        lengths_q, lengths_k = (~outside_q).sum(1), (~outside_k).sum(1)
    else:
        excluded = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    shift = 0 if mask in UPPER_LEFT else keys - queries
    if lengths_q is not None and mask not in UPPER_LEFT:
        shift = (lengths_k - lengths_q)[:, None, None, None]
    before, after = options["window"] or (-1, -1)
    after = 0 if options["causal"] else after
    distance = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None]
    distance = distance - shift
    if after >= 0:
        excluded = excluded | (distance > after)
    if before >= 0:
        excluded = excluded | (distance < -before)
    return excluded
