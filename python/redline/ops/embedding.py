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
