# Over budget: parameters: the signatures are Transformer Engine's.
"""Rotary embeddings from Megatron's table of angles [positions, 1, 1, rotary_dim]."""

import torch

from redline import ops
from redline.extensions.transformer_engine.rotary import apply_rotary_pos_emb
from redline.megatron.transformer_engine.pytorch.module.base import refuse

__all__ = ["apply_fused_qkv_rotary_pos_emb", "apply_rotary_pos_emb"]


def apply_fused_qkv_rotary_pos_emb(
    qkv,
    q_freqs,
    k_freqs,
    qkv_split_arg_list,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    """(q, k, v) of packed qkv [s, b, groups, q + k + v], q and k turned in one pass over it.

    qkv_split_arg_list: the sizes of q, k and v in a group; q is [s, b, heads, head_dim] then. v may
    not differ from k in size, nor k_freqs from q_freqs.
    """
    for argument, value, expected in (
        ("start_positions", start_positions, None),
        ("cu_seqlens", cu_seqlens, None),
        ("cp_size", cp_size, 1),
        ("k_freqs", None if k_freqs is q_freqs else "other angles", None),
    ):
        if value is not expected:
            refuse("apply_fused_qkv_rotary_pos_emb", argument, expected, value, "it is not built")
    q_size, k_size, v_size = qkv_split_arg_list
    groups, group = qkv.shape[-2], q_size // k_size
    angles = q_freqs.float().flatten(1)
    angles = angles[:, ::2] if interleaved else angles[:, : angles.shape[1] // 2]
    turned = ops.qkv_rotary(
        qkv.flatten(-2),
        angles.cos(),
        angles.sin(),
        groups * group,
        groups,
        None,
        interleaved,
        tensor_format,
    ).view(qkv.shape)
    q, k, v = torch.split(turned, [q_size, k_size, v_size], dim=-1)
    return q.reshape(*qkv.shape[:-2], groups * group, k_size), k, v
