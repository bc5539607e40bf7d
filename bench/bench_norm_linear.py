"""norm_linear, forward and backward in one call: three products, and the bytes of the norm's two
passes, of which the one that rebuilds the normalised input is none. The floor is both: the products
by torch.mm in the same run, and a copy of those bytes."""

import functools

import torch
import torch.nn.functional as F

import rivals
from bench import Case
from redline import ops
from redline.dyno.measure import saved_bytes

# (rows, in, out)
SIZES = [(16384, 4096, 6144), (16384, 4096, 4096), (4096, 4096, 6144)]
SIZES_CPU = [(1024, 512, 768)]


def both(forward):
    """Forward and backward of a function of leaves, the last input its upstream gradient."""

    def call(*given):
        leaves = [tensor.detach().requires_grad_() for tensor in given[:-1]]
        return torch.autograd.grad(forward(*leaves), leaves, given[-1])

    return call


def kept_by(forward, make):
    """Bytes kept for backward by a function of x and its parameters, which live anyway."""
    leaves = [tensor.requires_grad_() for tensor in make()[:-1]]
    return saved_bytes(lambda: forward(*leaves), leaves[1:])


def eager(x, norm_weight, weight):
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, 1e-5), weight)


def products(x, _, weight, y_grad):
    return x @ weight.t(), y_grad.t() @ x, y_grad @ weight


def cases(device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")
    for rows, cols, out in SIZES if device == "cuda" else SIZES_CPU:

        def make(rows=rows, cols=cols, out=out):
            shapes = ((rows, cols), (cols,), (out, cols), (rows, out))
            return tuple(torch.randn(*s, device=device, dtype=dtype) for s in shapes)

        forwards = {
            "redline": lambda x, g, w: ops.norm_linear(x, g, None, w),
            "kept": lambda x, g, w: ops.norm_linear(x, g, None, w, keep_normalized=True),
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
            **rivals.calls("norm_linear", cols, out),
        }
        calls = {name: both(forward) for name, forward in forwards.items()}
        kept = {name: functools.partial(kept_by, f, make) for name, f in forwards.items()}
        size = 5 * rows * cols * dtype.itemsize  # x and y; y_grad, x and x_grad
        text, flops = f"{rows} x {cols} to {out}", 6 * rows * cols * out
        calls["products"] = products
        yield Case("norm_linear", "both", text, name, size, make, calls, flops, kept=kept)
