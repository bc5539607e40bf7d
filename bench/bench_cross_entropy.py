"""Cross entropy: forward reads the logits; forward + backward reads them twice and writes once."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# 50257 classes put every row at another alignment.
SIZES = [(8192, 32000), (8192, 128256), (8192, 50257), (8192, 151936), (64, 128256)]
SIZES_CPU = [(4096, 8192), (1024, 32000)]


def maker(rows, cols, device, dtype):
    def make():
        logits = torch.randn(rows, cols, device=device, dtype=dtype)
        return logits, torch.randint(0, cols, (rows,), device=device)

    return make


def with_backward(forward):
    def call(logits, targets):
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf, targets), leaf)

    return call


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    variants = {
        "redline": ops.cross_entropy,
        "eager": F.cross_entropy,
        "compile": torch.compile(F.cross_entropy, dynamic=False),
    }
    for rows, cols in SIZES if device == "cuda" else SIZES_CPU:
        size = rows * cols * dtype.itemsize
        make, shape = maker(rows, cols, device, dtype), f"{rows} x {cols}"
        calls = {k: torch.no_grad()(call) for k, call in variants.items()}
        yield Case("cross_entropy", "fwd", shape, name, size, make, calls)
        calls = {k: with_backward(call) for k, call in variants.items()}
        yield Case("cross_entropy", "fwd+bwd", shape, name, 3 * size, make, calls)
