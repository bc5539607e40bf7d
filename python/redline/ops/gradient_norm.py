"""The norm of a list of gradients, and what clipping by it needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """sqrt(sum of g^2) over all elements of all gradients, which are on one device.

    Squares are added in float64, in an order that the shapes alone fix. A scalar of float32
    (float64 for float64); infinities and NaN come through. Nothing is read back to the host.

    >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    return _ops.gradient_norm(gradients)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), a float32 scalar. `adamw_step` takes it.

    >>> clip_coefficient(torch.tensor(4.0), 1.0)
    tensor(0.2500)
    """
    return _ops.clip_coefficient(norm, max_norm)


def scale_gradients(gradients: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies the gradients by a float32 scalar, in place; 1 leaves memory alone."""
    _ops.scale_gradients(gradients, coefficient)
