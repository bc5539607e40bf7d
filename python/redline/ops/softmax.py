"""Scaled masked softmax, for attention that is not fused."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """exp(scale * scores) / (sum(exp(scale * scores)) + exp(sink)), over the keys not excluded.

    scores: [..., heads, queries, keys], or fewer dimensions; mask: bool, broadcast to the scores,
    True where a key is excluded; sink: [heads], a logit in the denominator alone. `causal` excludes
    keys after the diagonal, aligned at the bottom right; `window` keeps the last so many keys up to
    that diagonal. A row with no key left gives zeros. Keeps the probabilities for backward.

    >>> softmax(torch.zeros(2, 2), causal=True)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    return _ops.softmax(scores, mask, scale, causal, window, sink)
