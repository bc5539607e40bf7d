# Over budget: parameters: the signatures are Transformer Engine's.
"""Rotary position embedding from a tensor of angles."""

import warnings

import torch

from redline import ops
from redline.extensions.transformer_engine.refusals import ONE_RANK, refuse
from redline.extensions.transformer_engine.table import works

FORMATS = ("sbhd", "bshd", "thd")


def _tables(freqs, interleaved):
    """cos and sin [positions, d / 2] of angles [positions, 1, 1, d], which hold each pair twice."""
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1):
        raise ValueError(
            "fused_apply_rotary_pos_emb: freqs: expected [positions, 1, 1, rotary_dim], "
            f"not {list(freqs.shape)}"
        )
    angles = freqs.detach()[:, 0, 0].float()
    angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[1] // 2]
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=True,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    """t with each pair of a head turned by its angle; elements from rotary_dim on are copied.

    t: [s, b, heads, d], [b, s, heads, d] or [tokens, heads, d] with cu_seqlens; freqs
    [positions, 1, 1, rotary_dim], both halves (interleaved: both of a pair) alike; start_positions
    [b]: where each sequence begins. Computed in float32 and rounded once, in both directions.
    """
    name = "fused_apply_rotary_pos_emb"
    refuse(name, "tensor_format", tensor_format, FORMATS)
    refuse(name, "cp_size", cp_size, (1,), ONE_RANK)
    cos, sin = _tables(freqs, interleaved)
    positions = None
    if start_positions is not None:
        length = t.shape[1 if tensor_format == "bshd" else 0]
        positions = start_positions.long()[:, None] + torch.arange(length, device=t.device)
    return ops.rotary(t, cos, sin, positions, interleaved, tensor_format, cu_seqlens=cu_seqlens)


@works("`rotary`")
def fused_apply_rotary_pos_emb(t, freqs, transpose_output_memory=False, interleaved=False):
    """t [s, b, heads, d] turned by the angles freqs [positions, 1, 1, rotary_dim]."""
    if transpose_output_memory:
        warnings.warn(
            "fused_apply_rotary_pos_emb: transpose_output_memory has no effect", stacklevel=2
        )
    return apply_rotary_pos_emb(t, freqs, "sbhd", interleaved=interleaved)


@works("`rotary`", "context parallel")
def fused_apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_size=1, cp_rank=0, interleaved=False):
    """t [tokens, heads, d], each sequence of cu_seqlens [n + 1] turned from position 0 on."""
    return apply_rotary_pos_emb(
        t,
        freqs,
        "thd",
        interleaved=interleaved,
        cu_seqlens=cu_seqlens,
        cp_size=cp_size,
        cp_rank=cp_rank,
    )
