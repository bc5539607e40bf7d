"""Embedding: rows of a table, with a gradient summed in a fixed order."""

import torch

from redline import ops


class Embedding(torch.nn.Embedding):
    """y = weight[tokens]; weight [num_embeddings, embedding_dim].

    torch.nn.Embedding's arguments; max_norm, scale_grad_by_freq and sparse are refused.

    >>> Embedding(8192, 1024)(torch.zeros(2, 16, dtype=torch.int64)).shape
    torch.Size([2, 16, 1024])
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, built in (
            ("max_norm", None),
            ("scale_grad_by_freq", False),
            ("sparse", False),
        ):
            if getattr(self, name) != built:
                raise ValueError(
                    f"Embedding: {name}: expected {built}, not {getattr(self, name)}: not built"
                )

    def forward(self, tokens):
        return ops.embedding(tokens, self.weight, self.padding_idx)
