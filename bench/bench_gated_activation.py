"""Gated activations: forward reads two halves and writes y; backward reads three, writes two. A
bias is as long as a row; a row's scale is one number, and so is its gradient."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case, both_directions
from redline import ops
from settings import settings

SIZES = [(8192, 1536), (8192, 4096), (16384, 4096), (16384, 14336)]
SIZES_CPU = [(4096, 1024)]
SIZES_CPU_LARGE = [(4096, 2048)]  # an x of 64 MB
SIZES_CPU_BF16 = [(4096, 1024)]
LIMIT, ALPHA, OFFSET = 7.0, 1.702, 1.0  # clamped_swiglu's own


def clamped_swiglu(gate, linear):
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (linear.clamp(-LIMIT, LIMIT) + OFFSET)


STOCK = {
    "swiglu": lambda gate, linear: F.silu(gate) * linear,
    "geglu": lambda gate, linear: F.gelu(gate, approximate="tanh") * linear,
    "reglu": lambda gate, linear: F.relu(gate) * linear,
    "quick_geglu": lambda gate, linear: gate * torch.sigmoid(1.702 * gate) * linear,
    "clamped_swiglu": clamped_swiglu,
}
OPTIONS = {"clamped_swiglu": {"limit": LIMIT, "alpha": ALPHA, "linear_offset": OFFSET}}
# What a row has beside its kind: gpt-oss's experts have all of it.
ROWS = [
    *((kind, ()) for kind in STOCK),
    ("swiglu", ("pair",)),
    ("geglu", ("pair",)),
    ("swiglu", ("bias",)),
    ("swiglu", ("row_scale",)),
    ("clamped_swiglu", ("bias", "row_scale")),
]


def forwards(kind, extras, bias):
    """Ours and stock, of (x), (x, row_scale) or (gate, linear)."""
    given = {"kind": kind, **OPTIONS.get(kind, {})} | ({"bias": bias} if bias is not None else {})

    def ours(x, *row_scale):
        scale = {"row_scale": row_scale[0]} if row_scale else {}
        return ops.gated_activation(x, **given, **scale)

    def eager(x, *row_scale):
        y = STOCK[kind](*(x if bias is None else x + bias).chunk(2, -1))
        return y * row_scale[0][:, None] if row_scale else y

    if "pair" in extras:
        return functools.partial(ops.gated_activation_pair, kind=kind), STOCK[kind]
    return ours, eager


def inputs_of(shape, extras):
    rows, cols = shape
    if "pair" in extras:
        return [shape, shape]
    return [(rows, 2 * cols)] + ([(rows,)] if "row_scale" in extras else [])


def cases_of(device, sizes, dtype, label, plain):
    def make(shape, extras, with_gradient):
        drawn = inputs_of(shape, extras) + ([shape] if with_gradient else [])
        return tuple(torch.randn(size, device=device, dtype=dtype) for size in drawn)

    for kind, extras in ((kind, ()) for kind in STOCK) if plain else ROWS:
        op = "gated_activation_pair" if "pair" in extras else "gated_activation"
        name = " ".join([op, kind, *(extra for extra in extras if extra != "pair")])
        for shape in sizes:
            bias = torch.randn(2 * shape[1], device=device, dtype=dtype, requires_grad=True)
            parameters = (bias,) if "bias" in extras else ()
            ours, eager = forwards(kind, extras, *parameters or (None,))
            calls = {
                "redline": ours,
                "eager": eager,
                "compile": torch.compile(eager, dynamic=False),
                **rivals.calls(name),
            }
            size = shape[0] * shape[1]
            bias_size = 2 * shape[1] * len(parameters)
            scale_size = shape[0] * ("row_scale" in extras)
            elements = (
                3 * size + bias_size + scale_size,
                5 * size + 2 * bias_size + 2 * scale_size,
            )
            sketch = Case(
                name=name,
                direction="",
                shape=f"{shape[0]} x {shape[1]}",
                dtype=label,
                bytes=tuple(count * dtype.itemsize for count in elements),
                make=functools.partial(make, shape, extras),
                calls={},
            )
            yield from both_directions(sketch, calls, parameters)


def cases(device):
    for setting in settings(device, SIZES, SIZES_CPU, SIZES_CPU_LARGE, SIZES_CPU_BF16):
        yield from cases_of(device, *setting)
