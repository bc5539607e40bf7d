"""Each op once, in plain torch and float64: written from the formula, not from a kernel.

Autograd of these is the reference for every gradient.
"""

import torch


def rms_norm(x, weight=None, epsilon=1e-5, zero_centered=False):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * (weight + 1 if zero_centered else weight)


def layer_norm(x, weight=None, bias=None, epsilon=1e-5, zero_centered=False):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + epsilon)
    if weight is not None:
        y = y * (weight + 1 if zero_centered else weight)
    return y if bias is None else y + bias
