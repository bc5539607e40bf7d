"""Bias, dropout and the residual sum in one pass."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    probability: float,
    training: bool = True,
) -> Tensor:
    """residual + dropout(x + bias): kept elements are divided by 1 - probability.

    x, residual: [..., cols]; bias: [cols]; residual and bias of x's dtype or float32. Returns
    residual's dtype. The numbers come from Philox 4x32-10, seeded by torch's generator of the
    device, one per element: backward draws them again, so no mask is kept, and the same state gives
    the same mask on every device. With probability 0, or without training, none are drawn.

    >>> bias_dropout_add(torch.ones(2), None, torch.ones(2), 0.5, training=False)
    tensor([2., 2.])
    """
    return _ops.bias_dropout_add(x, bias, residual, probability, training)
