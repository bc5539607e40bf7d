"""Cross entropy: forward reads the logits; forward + backward reads them twice and writes once,
over the logits themselves where the caller allows it. With a promised upstream gradient both read
them once."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case
from redline import ops

# 50257 classes put every row at another alignment.
VOCABULARIES = [32000, 50257, 100352, 128256, 151936, 152064, 201088, 262144]
SIZES = [*((8192, vocabulary) for vocabulary in VOCABULARIES), (64, 128256)]
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


class Product(torch.autograd.Function):
    """Stands for the product that computes logits: gives them as they are, in the same memory."""

    @staticmethod
    def forward(ctx, logits):
        return logits.new_empty(0).set_(logits.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_place(logits, targets, loss_scale=None):
    leaf = logits.detach().requires_grad_()
    options = {"inplace_backward": True, "loss_scale": loss_scale}
    return torch.autograd.grad(ops.cross_entropy(Product.apply(leaf), targets, **options), leaf)


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    variants = {
        "redline": ops.cross_entropy,
        "eager": F.cross_entropy,
        "compile": torch.compile(F.cross_entropy, dynamic=False),
        **rivals.calls("cross_entropy"),
    }
    for rows, cols in SIZES if device == "cuda" else SIZES_CPU:
        size = rows * cols * dtype.itemsize
        make, shape = maker(rows, cols, device, dtype), f"{rows} x {cols}"
        calls = {k: torch.no_grad()(call) for k, call in variants.items()}
        yield Case("cross_entropy", "fwd", shape, name, size, make, calls)
        calls = {k: with_backward(call) for k, call in variants.items()}
        yield Case(
            "cross_entropy", "fwd+bwd", shape, name, 3 * size, make, {**calls, "redline": in_place}
        )
        promised = functools.partial(in_place, loss_scale=torch.ones((), device=device))
        calls = {**calls, "redline": promised}
        yield Case("cross_entropy promised", "fwd+bwd", shape, name, 2 * size, make, calls)
