"""Rotary: either direction reads x once and writes it once; the tables stay in the cache."""

import torch

from bench import Case
from redline import ops

# (batch, seq, heads, head_dim)
SIZES = [(4, 4096, 32, 128), (2, 8192, 8, 128), (8, 2048, 16, 64)]
SIZES_CPU = [(4, 1024, 16, 64), (1, 1024, 8, 128)]


def rotate_half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def backward_of(forward):
    graphs = {}

    def call(x, y_grad):
        if x not in graphs:
            leaf = x.detach().requires_grad_()
            graphs[x] = (forward(leaf), leaf)
        y, leaf = graphs[x]
        return torch.autograd.grad(y, leaf, y_grad, retain_graph=True)

    return call


def variants(seq, head_dim, device, dtype):
    angles = torch.outer(
        torch.arange(seq, device=device).float(),
        10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device),
    )
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = (torch.cat((table, table), -1)[:, None].to(dtype) for table in (cos, sin))

    def eager(x):
        return rotate_half(x, wide_cos, wide_sin)

    return {
        "redline": lambda x: ops.rotary(x, cos, sin),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    for shape in SIZES if device == "cuda" else SIZES_CPU:
        calls = variants(shape[1], shape[3], device, dtype)
        size = 2 * torch.Size(shape).numel() * dtype.itemsize
        text = " x ".join(map(str, shape))

        def make(count, shape=shape):
            return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))

        forward = {key: torch.no_grad()(call) for key, call in calls.items()}
        yield Case("rotary", "fwd", text, name, size, lambda m=make: m(1), forward)
        backward = {key: backward_of(call) for key, call in calls.items()}
        yield Case("rotary", "bwd", text, name, size, lambda m=make: m(2), backward)
