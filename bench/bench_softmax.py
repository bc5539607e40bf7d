"""Causal softmax: forward reads half of the scores, writes all; backward reads two, writes one."""

import torch

from bench import Case
from redline import ops

# (batch, heads, queries, keys)
SIZES = [(2, 32, 2048, 2048), (1, 32, 4096, 4096), (8, 16, 1000, 1000)]
SIZES_CPU = [(4, 8, 512, 512), (1, 4, 1024, 4096)]


def stock(scores):
    excluded = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    excluded = excluded.triu(scores.shape[-1] - scores.shape[-2] + 1)
    return torch.softmax((scores * 0.125).masked_fill(excluded, float("-inf")), -1)


def with_backward(forward):
    def call(scores, upstream):
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, upstream)

    return call


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    variants = {
        "redline": lambda scores: ops.softmax(scores, None, 0.125, True),
        "eager": stock,
        "compile": torch.compile(stock, dynamic=False),
    }
    for size in SIZES if device == "cuda" else SIZES_CPU:
        elements = torch.Size(size).numel() * dtype.itemsize
        shape = " x ".join(str(n) for n in size)

        def make(count, size=size):
            return lambda: tuple(
                torch.randn(*size, device=device, dtype=dtype) for _ in range(count)
            )

        calls = {k: torch.no_grad()(call) for k, call in variants.items()}
        yield Case("softmax", "fwd", shape, name, 3 * elements // 2, make(1), calls)
        calls = {k: with_backward(call) for k, call in variants.items()}
        yield Case("softmax", "fwd+bwd", shape, name, 9 * elements // 2, make(2), calls)
