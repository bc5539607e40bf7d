"""Embedding: forward reads and writes a row per token; backward reads y_grad and writes weight's
gradient whole. Tokens are skewed, as text is: a few rows take many tokens."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# (tokens, vocabulary, hidden)
SIZES = [(16384, 131072, 4096), (16384, 32000, 2048), (8192, 8192, 1024)]
SIZES_CPU = [(4096, 8192, 1024), (1024, 8192, 256)]


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    for tokens, vocabulary, hidden in SIZES if device == "cuda" else SIZES_CPU:
        text = f"{tokens} of {vocabulary} x {hidden}"
        weight = torch.randn(vocabulary, hidden, device=device, dtype=dtype)

        def make(tokens=tokens, vocabulary=vocabulary):
            return ((torch.rand(tokens, device=device) ** 6 * vocabulary).long(),)

        def make_backward(make=make, shape=(tokens, hidden)):
            return (torch.randn(shape, device=device, dtype=dtype), *make())

        forward = {
            "redline": lambda t, w=weight: ops.embedding(t, w),
            "eager": lambda t, w=weight: F.embedding(t, w),
        }
        size = 2 * tokens * hidden * dtype.itemsize
        yield Case("embedding", "fwd", text, name, size, make, forward)
        backward = {
            "redline": lambda g, t, v=vocabulary: torch.ops.redline.embedding_backward(g, t, v),
            "eager": lambda g, t, v=vocabulary: torch.ops.aten.embedding_dense_backward(
                g, t, v, -1, False
            ),
        }
        size = (tokens + vocabulary) * hidden * dtype.itemsize
        yield Case("embedding", "bwd", text, name, size, make_backward, backward)
