"""norm_mlp, forward and backward in one call: six products, and the bytes of the norm's and the
activation's two passes, without those that rebuild what was not kept. The floor is both: the
products by torch.mm in the same run, and a copy of those bytes."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case
from bench_norm_linear import both, kept_by
from redline import ops

# (rows, in, ffn)
SIZES = [(16384, 4096, 14336), (8192, 4096, 14336), (4096, 4096, 14336)]
SIZES_CPU = [(512, 256, 704)]


def eager(x, norm_weight, fc1_weight, fc2_weight):
    up = F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, 1e-5), fc1_weight)
    gate, linear = up.chunk(2, -1)
    return F.linear(F.silu(gate) * linear, fc2_weight)


def tuned(x, norm_weight, fc1_weight, fc2_weight):
    return ops.norm_mlp(x, norm_weight, None, fc1_weight, None, fc2_weight)


def products(x, _, fc1_weight, fc2_weight, y_grad):
    up = x @ fc1_weight.t()
    activated = up.view(2, len(x), -1)[0]  # of the right shape, and contiguous
    y = activated @ fc2_weight.t()
    activated_grad, fc2_grad = y_grad @ fc2_weight, y_grad.t() @ activated
    return y, activated_grad, fc2_grad, up.t() @ x, up @ fc1_weight


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    for rows, cols, ffn in SIZES if device == "cuda" else SIZES_CPU:

        def make(rows=rows, cols=cols, ffn=ffn):
            shapes = ((rows, cols), (cols,), (2 * ffn, cols), (cols, ffn), (rows, cols))
            scales = (1.0, 1.0, cols**-0.5, ffn**-0.5, 1.0)
            each = zip(shapes, scales, strict=True)
            return tuple(torch.randn(*s, device=device, dtype=dtype) * k for s, k in each)

        forwards = {
            "redline": tuned,
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
            **rivals.calls("norm_mlp swiglu", cols, ffn),
        }
        calls = {name: both(forward) for name, forward in forwards.items()}
        kept = {name: functools.partial(kept_by, f, make) for name, f in forwards.items()}
        size = rows * (5 * cols + 8 * ffn) * dtype.itemsize
        text, flops = f"{rows} x {cols} by {ffn}", 18 * rows * cols * ffn
        calls["products"] = products
        yield Case("norm_mlp swiglu", "both", text, name, size, make, calls, flops, kept=kept)
