"""Cross entropy: forward reads the logits; forward + backward reads them twice and writes once,
over the logits themselves where the caller allows it. With a promised upstream gradient both read
them once. Predictions come out of the same read; "argmax" is our loss and torch's argmax."""

import functools
import math

import torch
import torch.nn.functional as F

import rivals
from bench import Case
from redline import ops
from settings import settings

# 50257 classes put every row at another alignment.
VOCABULARIES = [32000, 50257, 100352, 128256, 151936, 152064, 201088, 262144]
SIZES = [*((8192, vocabulary) for vocabulary in VOCABULARIES), (64, 128256)]
SIZES_CPU = [(4096, 8192), (1024, 32000)]  # 128 MB
SIZES_CPU_LARGE = []
SIZES_CPU_BF16 = [(4096, 8192)]
PREDICTED = [(8192, 50257), (8192, 128256), (8192, 152064)]


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


def with_argmax(call):
    """argmax first, for what `call` gives may go over the logits."""

    def both(logits, targets):
        predictions, given = logits.argmax(-1), call(logits, targets)
        return *(given if isinstance(given, tuple) else (given,)), predictions

    return both


def predicted(loss_scale, logits, targets):
    leaf = logits.detach().requires_grad_()
    loss, predictions = ops.cross_entropy(
        Product.apply(leaf),
        targets,
        inplace_backward=True,
        loss_scale=loss_scale,
        return_predictions=True,
    )
    return *torch.autograd.grad(loss, leaf), predictions


def predictions_cases(make, shape, dtype, device):
    """One read of the logits; with a promise one read and one write."""
    size = dtype.itemsize * math.prod(map(int, shape.split(" x ")))
    name = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    calls = {
        "redline": functools.partial(ops.cross_entropy, return_predictions=True),
        "argmax": with_argmax(ops.cross_entropy),
        "eager": with_argmax(F.cross_entropy),
        "compile": torch.compile(with_argmax(F.cross_entropy), dynamic=False),
    }
    calls = {k: torch.no_grad()(call) for k, call in calls.items()}
    yield Case("cross_entropy predictions", "fwd", shape, name, size, make, calls)
    one = torch.ones((), device=device)
    calls = {
        "redline": functools.partial(predicted, one),
        "argmax": with_argmax(functools.partial(in_place, loss_scale=one)),
        "eager": with_argmax(with_backward(F.cross_entropy)),
    }
    title = "cross_entropy promised predictions"
    yield Case(title, "fwd+bwd", shape, name, 2 * size, make, calls)


def cases_of(device, sizes, dtype, label, plain):
    variants = {
        "redline": ops.cross_entropy,
        "eager": F.cross_entropy,
        "compile": torch.compile(F.cross_entropy, dynamic=False),
        **rivals.calls("cross_entropy"),
    }
    for rows, cols in sizes:
        size = rows * cols * dtype.itemsize
        make, shape = maker(rows, cols, device, dtype), f"{rows} x {cols}"
        calls = {k: torch.no_grad()(call) for k, call in variants.items()}
        yield Case("cross_entropy", "fwd", shape, label, size, make, calls)
        calls = {k: with_backward(call) for k, call in variants.items()}
        yield Case(
            "cross_entropy", "fwd+bwd", shape, label, 3 * size, make, {**calls, "redline": in_place}
        )
        promised = functools.partial(in_place, loss_scale=torch.ones((), device=device))
        calls = {**calls, "redline": promised}
        yield Case("cross_entropy promised", "fwd+bwd", shape, label, 2 * size, make, calls)
        if not plain and (device == "cpu" or (rows, cols) in PREDICTED):
            yield from predictions_cases(make, shape, dtype, device)


def cases(device):
    for setting in settings(device, SIZES, SIZES_CPU, SIZES_CPU_LARGE, SIZES_CPU_BF16):
        yield from cases_of(device, *setting)
