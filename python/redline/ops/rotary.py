"""Rotary position embedding of one tensor, of q and k, or of q and k inside packed q, k and v."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bshd",
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """(a cos - b sin, b cos + a sin) for each pair (a, b) of a head (Su et al., 2021).

    x: [batch, seq, heads, head_dim] (layout bshd), [seq, batch, heads, head_dim] (sbhd) or
    [tokens, heads, head_dim] (thd); any strides, read in place where head_dim is adjacent.
    cos, sin: float32 [positions, rotary_dim / 2]; elements of a head from rotary_dim on are copied.
    positions: the tables' row of each token, int64 or int32, [seq] or [batch, seq], for thd
    [tokens]. Without them a sequence counts from 0, in thd from each boundary of cu_seqlens, int64
    or int32 [sequences + 1]; thd tokens outside the boundaries are copied.
    interleaved: pairs are (x[2 i], x[2 i + 1]) and not (x[i], x[i + rotary_dim / 2]).
    A position outside the tables is an error on CPU and gives NaN on CUDA; boundaries that fall or
    lie beyond the tokens are an error on CPU. Computes in float32,
    rounds once, keeps nothing per token for backward; cos and sin have no gradient.

    >>> quarter = torch.tensor([[0.0], [1.0]])
    >>> rotary(torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]), 1 - quarter, quarter)
    tensor([[[[1., 0.]],
    <BLANKLINE>
             [[0., 1.]]]])
    """
    return _ops.rotary(x, cos, sin, positions, interleaved, layout, cu_seqlens=cu_seqlens)


def rotary_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bshd",
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rotary` of q and of k in one launch, forward and backward, with the bits of two calls.

    q, k: as x in `rotary`, of one dtype, with the same sizes but for the heads, each of any
    strides. Everything else is as there, and so are the errors. Where one of them needs no
    gradient, or its result gets none, backward turns the other alone.

    >>> one = torch.ones(1, 1)
    >>> rotary_pair(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 2), 0 * one, one)
    (tensor([[[[-1.,  1.],
              [-1.,  1.]]]]), tensor([[[[-1.,  1.]]]]))
    """
    return _ops.rotary_pair(q, k, cos, sin, positions, interleaved, layout, cu_seqlens=cu_seqlens)


def qkv_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    positions: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bshd",
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`rotary` of the q and k inside packed q, k and v; v is copied.

    qkv: as x in `rotary` with its last two axes packed into one of
    ``kv_heads * (heads / kv_heads + 2) * head_dim``: per key head, its q heads, then k, then v.
    Returns one tensor of the same shape and packing.

    >>> qkv_rotary(torch.ones(1, 1, 6), torch.zeros(1, 1), torch.ones(1, 1), heads=1, kv_heads=1)
    tensor([[[-1.,  1., -1.,  1.,  1.,  1.]]])
    """
    return _ops.qkv_rotary(
        qkv, cos, sin, heads, kv_heads, positions, interleaved, layout, cu_seqlens=cu_seqlens
    )


def qkv_rotary_split(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    positions: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bshd",
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_rotary`, whose q, k and v are written apart, where attention reads them.

    Returns q [..., heads, head_dim], and k and v [..., kv_heads, head_dim], contiguous. Backward
    writes their gradients, of any strides, straight into that of qkv.

    >>> q, k, v = qkv_rotary_split(torch.ones(1, 1, 8), torch.zeros(1, 1), torch.ones(1, 1), 2, 1)
    >>> q.shape, k, v
    (torch.Size([1, 1, 2, 2]), tensor([[[[-1.,  1.]]]]), tensor([[[[1., 1.]]]]))
    """
    return _ops.qkv_rotary_split(
        qkv, cos, sin, heads, kv_heads, positions, interleaved, layout, cu_seqlens=cu_seqlens
    )
