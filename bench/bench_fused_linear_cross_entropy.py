"""A head and its loss, forward and backward: "promised" in three products, the upstream gradient
given beforehand, "recomputed" in four. "products" are the bare ones, of all tokens at once."""

import functools

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops
from redline.dyno.measure import profiled, quiet_profiler

# (tokens, hidden, vocabulary)
SIZES = [(8192, 4096, 128256), (8192, 4096, 32000), (8192, 2048, 50257), (16384, 8192, 128256)]
SIZES_CPU = [(2048, 256, 8192), (1024, 512, 32000)]


def eager(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets)


def promised(x, weight, targets):
    return ops.fused_linear_cross_entropy(x, weight, targets, loss_scale=1.0)


def with_backward(forward):
    def call(x, weight, targets):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
        return torch.autograd.grad(forward(*leaves, targets), leaves)

    return call


def peak_of(call, make):
    """Bytes at most in use within a call, its inputs and the gradients that it gives not counted,
    as the law of docs/memory.md has it."""
    inputs = make()

    def step():
        return call(*inputs)

    step()
    with quiet_profiler():
        peak = profiled(step, inputs[0].device).peak_bytes
    return peak - sum(tensor.nbytes for tensor in inputs[:2])


def products(count):
    @torch.no_grad()
    def call(x, weight, _):
        for _ in range(count - 2):
            logits = x @ weight.t()
        return logits @ weight, logits.t() @ x

    return call


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    rivals = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    sizes = SIZES if device == "cuda" else SIZES_CPU
    for size in sizes:
        tokens, hidden, vocabulary = size

        def make(sizes=((tokens, hidden), (vocabulary, hidden)), classes=vocabulary):
            x, weight = (torch.randn(*s, device=device, dtype=dtype) for s in sizes)
            weight /= sizes[0][1] ** 0.5
            return x, weight, torch.randint(classes, sizes[0][:1], device=device)

        for direction, ours, count in (
            ("promised", promised, 3),
            ("recomputed", ops.fused_linear_cross_entropy, 4),
        ):
            calls = {k: with_backward(call) for k, call in {"redline": ours, **rivals}.items()}
            peak = {k: functools.partial(peak_of, call, make) for k, call in calls.items()}
            yield Case(
                "fused_linear_cross_entropy",
                direction,
                f"{tokens} x {hidden} x {vocabulary}",
                name,
                2 * (tokens + vocabulary) * hidden * dtype.itemsize,
                make,
                {**calls, "products": products(count)},
                2 * count * tokens * hidden * vocabulary,
                peak=peak if size == sizes[0] else {},  # each costs a run of the profiler
            )
