"""Embedding: rows of a table by token, with a gradient that is the same on every run."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def embedding(tokens: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """weight[tokens].

    tokens: any shape, int64 or int32; weight: [vocabulary, hidden]. Returns [*tokens, hidden] of
    weight's dtype. The gradient of a row sums its tokens in the order in which they occur, in
    float32, and rounds once; the row `padding_idx` gets none. A token outside the vocabulary is an
    error on CPU and a row of NaN on CUDA. Keeps the tokens for backward.

    >>> embedding(torch.tensor([2, 0]), torch.tensor([[0.0], [1.0], [2.0]]))
    tensor([[2.],
            [0.]])
    """
    return _ops.embedding(tokens, weight, padding_idx)


def embedding_backward_into(
    buffer: Tensor, y_grad: Tensor, tokens: Tensor, padding_idx: int | None = None
) -> None:
    """buffer[tokens] += y_grad: the gradient of `embedding`, added to what `buffer` holds.

    buffer: [vocabulary, hidden] of y_grad's dtype or float32, such as a ``main_grad``; its rows may
    lie apart, and it shares no memory with y_grad: both are checked. y_grad: [*tokens, hidden]. A
    row's tokens are added in the order of `embedding`, to the row's value, and rounded once.
    """
    _ops.embedding_backward_into(buffer, y_grad, tokens, padding_idx)
