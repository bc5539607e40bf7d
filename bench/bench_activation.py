"""Activations: forward reads x and writes y; backward reads both and writes x_grad."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case, both_directions
from redline import ops
from settings import settings

SIZES = [(8192, 4096), (16384, 16384)]
SIZES_CPU = [(4096, 1024)]
SIZES_CPU_LARGE = [(4096, 4096)]  # 64 MB
SIZES_CPU_BF16 = [(4096, 1024)]
STOCK = {
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def make(shape, device, dtype, with_gradient):
    return tuple(
        torch.randn(shape, device=device, dtype=dtype) for _ in range(2 if with_gradient else 1)
    )


def cases_of(device, sizes, dtype, label, plain):
    for kind, stock in STOCK.items():
        for shape in sizes:
            for with_bias in (False,) if plain else (False, True):
                bias = torch.randn(shape[1], device=device, dtype=dtype, requires_grad=True)
                parameters = (bias,) if with_bias else ()

                def eager(x, stock=stock, parameters=parameters):
                    return stock(sum(parameters, x))

                calls = {
                    "redline": functools.partial(
                        lambda x, kind, bias: ops.activation(x, bias, kind),
                        kind=kind,
                        bias=bias if with_bias else None,
                    ),
                    "eager": eager,
                    "compile": torch.compile(eager, dynamic=False),
                    **rivals.calls(f"activation {kind}" + " bias" * with_bias),
                }
                size = shape[0] * shape[1] * dtype.itemsize
                sketch = Case(
                    name=f"activation {kind}" + " bias" * with_bias,
                    direction="",
                    shape=f"{shape[0]} x {shape[1]}",
                    dtype=label,
                    bytes=(2 * size, 3 * size),
                    make=functools.partial(make, shape, device, dtype),
                    calls={},
                )
                yield from both_directions(sketch, calls, parameters)


def cases(device):
    for setting in settings(device, SIZES, SIZES_CPU, SIZES_CPU_LARGE, SIZES_CPU_BF16):
        yield from cases_of(device, *setting)
