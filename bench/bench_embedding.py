"""Embedding of tokens as frequent as words are (Zipf: the k-th takes a share of 1 / k). Forward
reads the rows that are named, each once, and writes a row per token; the gradient reads a row per
token and writes the weight's gradient whole, or reads and writes the named rows of a buffer."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# (tokens, vocabulary, hidden)
SIZES = [(16384, 128256, 4096), (16384, 32000, 2048), (8192, 8192, 1024)]
SIZES_CPU = [(4096, 8192, 1024), (1024, 8192, 256)]


def draw(tokens, vocabulary, device):
    shares = 1 / torch.arange(1, vocabulary + 1, device=device, dtype=torch.float32)
    return torch.multinomial(shares, tokens, replacement=True)


def dense(buffer, y_grad, tokens):
    """Stock's way to a buffer: a gradient of the whole weight, which is then added."""
    grad = torch.ops.aten.embedding_dense_backward(y_grad, tokens, len(buffer), -1, False)
    return buffer.add_(grad)


def ours(buffer, y_grad, tokens):
    torch.ops.redline.embedding_backward_into(buffer, y_grad, tokens)
    return buffer


VARIANTS = {
    "fwd": {"redline": ops.embedding, "eager": F.embedding},
    "bwd": {
        "redline": lambda g, t, w: torch.ops.redline.embedding_backward(g, t, len(w)),
        "eager": lambda g, t, w: torch.ops.aten.embedding_dense_backward(g, t, len(w), -1, False),
    },
    "bwd into": {
        "redline": ours,
        "eager": dense,
        # Faster and of no fixed order: each token adds to its row by itself.
        "index_add": lambda buffer, g, t: buffer.index_add_(0, t, g.to(buffer.dtype)),
    },
}


def cases(device):
    dtype, label = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    for tokens, vocabulary, hidden in SIZES if device == "cuda" else SIZES_CPU:
        named = len(draw(tokens, vocabulary, device).unique())  # the same within a percent or two
        weight = torch.randn(vocabulary, hidden, device=device, dtype=dtype)
        buffer = torch.zeros(vocabulary, hidden, device=device)

        def make(direction, size=(tokens, vocabulary, hidden), weight=weight, buffer=buffer):
            drawn = draw(*size[:2], device)
            y_grad = torch.randn(size[0], size[2], device=device, dtype=dtype)
            inputs = {"fwd": (drawn, weight), "bwd": (y_grad, drawn, weight)}
            return inputs.get(direction, (buffer, y_grad, drawn))

        row, wide_row = hidden * dtype.itemsize, hidden * buffer.itemsize
        for direction, size in (
            ("fwd", (named + tokens) * row),
            ("bwd", (tokens + vocabulary) * row),
            ("bwd into", tokens * row + 2 * named * wide_row),
        ):
            yield Case(
                name="embedding" if direction != "bwd into" else "embedding main_grad",
                direction=direction.split()[0],
                shape=f"{tokens} of {vocabulary} x {hidden}",
                dtype=label,
                bytes=size,
                make=lambda direction=direction, make=make: make(direction),
                calls=dict(VARIANTS[direction]),
            )
