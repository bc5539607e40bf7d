"""bias_dropout_add: forward reads two tensors and writes y; backward turns y_grad into x_grad."""

import functools

import torch
import torch.nn.functional as F

from bench import Case, both_directions
from redline import ops

SIZES = [(8192, 4096), (16384, 4096)]
SIZES_CPU = [(4096, 1024)]
PROBABILITY = 0.1


def make(shape, device, dtype, with_gradient):
    return tuple(
        torch.randn(shape, device=device, dtype=dtype) for _ in range(3 if with_gradient else 2)
    )


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    for shape in SIZES if device == "cuda" else SIZES_CPU:
        for with_bias in (False, True):
            bias = torch.randn(shape[1], device=device, dtype=dtype, requires_grad=True)
            parameters = (bias,) if with_bias else ()

            def eager(x, residual, parameters=parameters):
                return residual + F.dropout(sum(parameters, x), PROBABILITY)

            calls = {
                "redline": functools.partial(
                    lambda x, residual, bias: ops.bias_dropout_add(x, bias, residual, PROBABILITY),
                    bias=bias if with_bias else None,
                ),
                "eager": eager,
                "compile": torch.compile(eager, dynamic=False),
            }
            size = shape[0] * shape[1] * dtype.itemsize
            sketch = Case(
                name="bias_dropout_add" if with_bias else "dropout_add",
                direction="",
                shape=f"{shape[0]} x {shape[1]}",
                dtype=name,
                bytes=(3 * size, 2 * size),
                make=functools.partial(make, shape, device, dtype),
                calls={},
                random=True,
            )
            yield from both_directions(sketch, calls, parameters)
