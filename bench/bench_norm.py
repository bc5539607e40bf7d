"""Norms: forward reads x and writes y; backward reads x and y_grad and writes x_grad."""

import functools

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

SIZES = [(8192, 4096), (16384, 1024), (8192, 8192), (65536, 256), (4096, 16384)]
SIZES_CPU = [(4096, 1024), (2048, 4096)]


def forwards(norm, cols, device, dtype):
    weight, bias = (torch.rand(cols, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    if norm == "rms_norm":
        ours = lambda x: ops.rms_norm(x, weight)  # noqa: E731
        return ours, lambda x: F.rms_norm(x, (cols,), weight, 1e-5), (weight,)
    ours = lambda x: ops.layer_norm(x, weight, bias)  # noqa: E731
    return ours, lambda x: F.layer_norm(x, (cols,), weight, bias), (weight, bias)


def backward_of(forward, parameters):
    """One graph per input set is built on first use; then only its backward runs."""
    graphs = {}

    def call(x, y_grad):
        if x not in graphs:
            leaf = x.detach().requires_grad_()
            graphs[x] = (forward(leaf), leaf)
        y, leaf = graphs[x]
        return torch.autograd.grad(y, (leaf, *parameters), y_grad, retain_graph=True)

    return call


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    for norm in ("rms_norm", "layer_norm"):
        for rows, cols in SIZES if device == "cuda" else SIZES_CPU:
            ours, eager, parameters = forwards(norm, cols, device, dtype)
            compiled = torch.compile(eager, dynamic=False)
            size = rows * cols * dtype.itemsize
            draw = functools.partial(torch.randn, rows, cols, device=device, dtype=dtype)

            def make(count, draw=draw):
                return lambda: tuple(draw() for _ in range(count))

            with torch.no_grad():
                calls = {"redline": ours, "eager": eager, "compile": compiled}
            calls = {k: torch.no_grad()(call) for k, call in calls.items()}
            yield Case(norm, "fwd", f"{rows} x {cols}", name, 2 * size, make(1), calls)
            calls = {"redline": ours, "eager": eager, "compile": compiled}
            calls = {k: backward_of(call, parameters) for k, call in calls.items()}
            yield Case(norm, "bwd", f"{rows} x {cols}", name, 3 * size, make(2), calls)
