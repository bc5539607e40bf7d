"""Norms: forward reads x and writes y; backward reads x and y_grad and writes x_grad. With a
residual each direction has one tensor more to read, and forward writes the sum. Behind dropout
backward writes the gradient of x beside the residual's. With the rows' largest magnitudes forward
writes 4 bytes a row more: beside its own row without them."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case, both_directions, empty_kernels
from redline import ops
from settings import settings

# Heads' norms, models' widths, and rows that outgrow a block.
SIZES = [
    (1 << 20, 128),
    (262144, 256),
    (65536, 1024),
    (32768, 2048),
    (8192, 4096),
    (16384, 4096),
    (16384, 5120),
    (8192, 8192),
    (4096, 16384),
    (1024, 65536),
    (64, 4096),
    (256, 2048),
    (1, 8192),
]
SIZES_CPU = [(4096, 1024), (2048, 4096)]
AMAX_SIZES = [(262144, 256), (8192, 4096), (16384, 4096), (8192, 8192), (1024, 65536)]
SIZES_CPU_LARGE = [(4096, 4096)]  # 64 MB
SIZES_CPU_BF16 = [(4096, 1024)]
SMALL = 2**19  # elements, of which launches take the most time
DROPOUT_SIZES = [(65536, 1024), (8192, 4096), (16384, 4096), (8192, 8192)]
PROBABILITY = 0.1


def stock_of(norm, cols, weight, bias):
    if norm == "rms_norm":
        return lambda x: F.rms_norm(x, (cols,), weight, 1e-5)
    return lambda x: F.layer_norm(x, (cols,), weight, bias)


def forwards(name, cols, weight, bias):
    norm = name.removeprefix("residual_")
    stock = stock_of(norm, cols, weight, bias)
    parameters = (weight,) if norm == "rms_norm" else (weight, bias)
    ours = getattr(ops, name)
    if name == norm:
        return {"redline": lambda x: ours(x, *parameters), "eager": stock}, parameters

    def eager(x, residual):
        total = x + residual
        return stock(total), total

    return {"redline": lambda x, r: ours(x, r, *parameters), "eager": eager}, parameters


def dropped(norm, cols, weight, bias):
    """The norm of residual + dropout(x): in one op, in our two, and stock's."""
    stock = stock_of(norm, cols, weight, bias)
    parameters = (weight,) if norm == "rms_norm" else (weight, bias)
    one, second = getattr(ops, f"bias_dropout_residual_{norm}"), getattr(ops, norm)

    def two_ops(x, residual):
        total = ops.bias_dropout_add(x, None, residual, PROBABILITY)
        return second(total, *parameters), total

    def eager(x, residual):
        total = residual + F.dropout(x, PROBABILITY)
        return stock(total), total

    calls = {"redline": lambda x, r: one(x, None, r, PROBABILITY, *parameters)}
    calls |= {"two ops": two_ops, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return calls, parameters


def dropout_cases(device, sizes, dtype, label):
    for norm in ("rms_norm", "layer_norm"):
        for shape in DROPOUT_SIZES if device == "cuda" else sizes:
            weight, bias = (
                torch.rand(shape[1], device=device, dtype=dtype).requires_grad_() for _ in range(2)
            )
            draw = functools.partial(torch.randn, shape, device=device, dtype=dtype)

            def make(with_gradient, draw=draw):
                return tuple(draw() for _ in range(4 if with_gradient else 2))

            size = shape[0] * shape[1] * dtype.itemsize
            sketch = Case(
                name=f"dropout_residual_{norm}",
                direction="",
                shape=f"{shape[0]} x {shape[1]}",
                dtype=label,
                bytes=(4 * size, 5 * size),
                make=make,
                calls={},
                random=True,
            )
            calls, parameters = dropped(norm, shape[1], weight, bias)
            yield from both_directions(sketch, calls, parameters, outputs=2)


def amax_cases(device, sizes, dtype, label):
    for norm in ("rms_norm", "layer_norm"):
        for shape in AMAX_SIZES if device == "cuda" else sizes:
            weight, bias = (torch.rand(shape[1], device=device, dtype=dtype) for _ in range(2))
            parameters = (weight,) if norm == "rms_norm" else (weight, bias)
            one = functools.partial(getattr(ops, norm), return_amax=True)

            def with_amax(norm_of):
                def call(x):
                    y = norm_of(x)
                    return y, y.abs().amax(-1).float()

                return call

            plain, stock = getattr(ops, norm), stock_of(norm, shape[1], weight, bias)
            calls = {
                "redline": lambda x, one=one, parameters=parameters: one(x, *parameters),
                "two ops": with_amax(lambda x, plain=plain, p=parameters: plain(x, *p)),
                "eager": with_amax(stock),
            }
            calls["compile"] = torch.compile(calls["eager"], dynamic=False)
            yield Case(
                name=f"{norm} amax",
                direction="fwd",
                shape=f"{shape[0]} x {shape[1]}",
                dtype=label,
                bytes=2 * shape[0] * shape[1] * dtype.itemsize + 4 * shape[0],
                make=lambda shape=shape: (torch.randn(shape, device=device, dtype=dtype),),
                calls=calls,
            )


def beside_empty_kernels(case):
    case.calls["empty"] = empty_kernels(case.calls["redline"])
    return case


def cases_of(device, sizes, dtype, label, plain):
    for name in ("rms_norm", "layer_norm", "residual_rms_norm", "residual_layer_norm"):
        for rows, cols in sizes:
            weight, bias = (
                torch.rand(cols, device=device, dtype=dtype).requires_grad_() for _ in range(2)
            )
            calls, parameters = forwards(name, cols, weight, bias)
            calls["compile"] = torch.compile(calls["eager"], dynamic=False)
            calls |= rivals.calls(name, *parameters)
            tensors = 2 if name.startswith("residual") else 1
            draw = functools.partial(torch.randn, rows, cols, device=device, dtype=dtype)

            def make(with_gradient, draw=draw, tensors=tensors):
                return tuple(draw() for _ in range(2 * tensors if with_gradient else tensors))

            size = rows * cols * dtype.itemsize
            sketch = Case(
                name=name,
                direction="",
                shape=f"{rows} x {cols}",
                dtype=label,
                bytes=(2 * tensors * size, (2 + tensors) * size),
                make=make,
                calls={},
            )
            found = both_directions(sketch, calls, parameters, outputs=tensors)
            small = device == "cuda" and rows * cols <= SMALL
            yield from map(beside_empty_kernels, found) if small else found
    if not plain:
        yield from amax_cases(device, sizes, dtype, label)
        yield from dropout_cases(device, sizes, dtype, label)


def cases(device):
    for setting in settings(device, SIZES, SIZES_CPU, SIZES_CPU_LARGE, SIZES_CPU_BF16):
        yield from cases_of(device, *setting)
