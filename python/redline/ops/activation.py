"""Activations, alone and with a bias added first."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def activation(x: Tensor, bias: Tensor | None = None, kind: str = "gelu") -> Tensor:
    """f(x + bias), element by element, in one pass over memory.

    x: [..., cols]; bias: [cols], of x's dtype or float32. kind: gelu (tanh), gelu_erf, quick_gelu
    (x * sigmoid(1.702 x)), silu, relu, squared_relu. Returns x's shape and dtype. Keeps x and bias
    for backward, which gives the bias's gradient in the same pass.

    >>> activation(torch.tensor([-1.0, 2.0]), kind="squared_relu")
    tensor([0., 4.])
    """
    return _ops.activation(x, bias, kind)
