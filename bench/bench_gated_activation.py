"""Gated activations: forward reads two halves and writes y; backward reads three, writes two."""

import functools

import torch
import torch.nn.functional as F

from bench import Case, both_directions
from redline import ops

SIZES = [(8192, 1536), (8192, 4096), (16384, 4096), (16384, 14336)]
SIZES_CPU = [(4096, 1024)]
STOCK = {
    "swiglu": F.silu,
    "geglu": functools.partial(F.gelu, approximate="tanh"),
    "reglu": F.relu,
}


def make(shape, device, dtype, with_gradient):
    x = torch.randn(shape[0], 2 * shape[1], device=device, dtype=dtype)
    return (x, torch.randn(shape, device=device, dtype=dtype)) if with_gradient else (x,)


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    for kind, stock in STOCK.items():
        for shape in SIZES if device == "cuda" else SIZES_CPU:

            def eager(x, stock=stock):
                gate, linear = x.chunk(2, -1)
                return stock(gate) * linear

            calls = {
                "redline": functools.partial(ops.gated_activation, kind=kind),
                "eager": eager,
                "compile": torch.compile(eager, dynamic=False),
            }
            size = shape[0] * shape[1] * dtype.itemsize
            sketch = Case(
                name=f"gated_activation {kind}",
                direction="",
                shape=f"{shape[0]} x {shape[1]}",
                dtype=name,
                bytes=(3 * size, 5 * size),
                make=functools.partial(make, shape, device, dtype),
                calls={},
            )
            yield from both_directions(sketch, calls)
