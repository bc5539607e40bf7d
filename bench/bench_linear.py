"""Linear: one product forward, and the weight's gradient added to a float32 buffer, which is read
and written once; stock makes the gradient, widens it and adds it."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# (rows, in, out)
SIZES = [(8192, 4096, 6144), (8192, 4096, 14336), (8192, 14336, 4096), (1024, 4096, 4096)]
SIZES_CPU = [(512, 256, 768), (1024, 512, 512)]


def accumulate(main_grad, y_grad, x):
    torch.ops.redline.linear_weight_grad_into(main_grad, y_grad, x)
    return main_grad


def accumulate_eager(main_grad, y_grad, x):
    return main_grad.add_(y_grad.t() @ x)


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"

    def make(*shapes):
        return tuple(torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)

    for rows, cols, out in SIZES if device == "cuda" else SIZES_CPU:
        text, flops = f"{rows} x {cols} to {out}", 2 * rows * cols * out
        size = (rows * cols + out * cols + rows * out) * dtype.itemsize
        calls = {
            "redline": torch.no_grad()(ops.linear),
            "eager": torch.no_grad()(F.linear),
            "compile": torch.no_grad()(torch.compile(F.linear, dynamic=False)),
        }
        shapes = (rows, cols), (out, cols)
        yield Case("linear", "fwd", text, name, size, lambda s=shapes: make(*s), calls, flops)

        def with_buffer(shapes=((rows, out), (rows, cols)), weight=(out, cols)):
            return torch.zeros(weight, device=device), *make(*shapes)

        size = rows * (cols + out) * dtype.itemsize + 2 * out * cols * torch.float32.itemsize
        calls = {
            "redline": accumulate,
            "eager": accumulate_eager,
            "compile": torch.compile(accumulate_eager, dynamic=False),
        }
        yield Case("linear main_grad", "wgrad", text, name, size, with_buffer, calls, flops)
