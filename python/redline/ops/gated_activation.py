"""Gated linear units, packed and as a pair."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def gated_activation(
    x: Tensor,
    *,
    kind: str = "swiglu",
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    linear_offset: float | None = None,
    row_count: Tensor | None = None,
) -> Tensor:
    """f(gate) * linear, gate and linear the halves of x + bias (Shazeer, 2020).

    x: [..., 2 * cols]; bias: [2 * cols]; row_scale: one number per row, multiplied into the result;
    both of x's dtype or float32. kind: swiglu (silu), geglu (tanh gelu), reglu, quick_geglu
    (a * sigmoid(1.702 a)), clamped_swiglu (gate below `limit`, linear within it and `linear_offset`
    added, sigmoid of `alpha` times the gate; 7.0, 1.0 and 1.702 where not given).
    row_count: one int64 on x's device; rows from it on give zeros.
    Returns [..., cols] of x's dtype. Keeps x for backward, which gives one packed gradient.

    >>> gated_activation(torch.tensor([[2.0, 3.0]]), kind="reglu")
    tensor([[6.]])
    """
    return _ops.gated_activation(
        x,
        kind=kind,
        bias=bias,
        row_scale=row_scale,
        limit=limit,
        alpha=alpha,
        linear_offset=linear_offset,
        row_count=row_count,
    )


def gated_activation_pair(
    gate: Tensor,
    linear: Tensor,
    *,
    kind: str = "swiglu",
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    linear_offset: float | None = None,
    row_count: Tensor | None = None,
) -> Tensor:
    """f(gate) * linear of two tensors [..., cols], or views; options as in `gated_activation`.

    bias is [2 * cols]: the gate's, then the linear's. Keeps both tensors, gives two gradients.
    """
    return _ops.gated_activation_pair(
        gate,
        linear,
        kind=kind,
        bias=bias,
        row_scale=row_scale,
        limit=limit,
        alpha=alpha,
        linear_offset=linear_offset,
        row_count=row_count,
    )
