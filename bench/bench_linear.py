"""Linear: one product forward, and the weight's gradient added to a float32 buffer, which is read
and written once; stock makes the gradient, widens it and adds it."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# (rows, in, out)
SIZES = [(8192, 4096, 6144), (8192, 4096, 14336), (8192, 14336, 4096), (1024, 4096, 4096)]
SIZES_CPU = [(512, 256, 768), (1024, 512, 512)]


def accumulate_eager(main_grad, y_grad, x):
    main_grad.add_(y_grad.t() @ x)


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    into = torch.ops.redline.linear_weight_grad_into
    for rows, cols, out in SIZES if device == "cuda" else SIZES_CPU:
        text, flops = f"{rows} x {cols} to {out}", 2 * rows * cols * out

        def make(*shapes):
            return lambda: tuple(torch.randn(*s, device=device, dtype=dtype) for s in shapes)

        forward = {"redline": torch.no_grad()(ops.linear), "eager": torch.no_grad()(F.linear)}
        size = (rows * cols + out * cols + rows * out) * dtype.itemsize
        inputs = make((rows, cols), (out, cols))
        yield Case("linear", "fwd", text, name, size, inputs, forward, flops)
        buffer = torch.zeros(out, cols, device=device)
        backward = {
            "redline": lambda g, x, b=buffer: into(b, g, x),
            "eager": lambda g, x, b=buffer: accumulate_eager(b, g, x),
        }
        size = rows * (cols + out) * dtype.itemsize + 2 * out * cols * buffer.itemsize
        inputs = make((rows, out), (rows, cols))
        yield Case("linear", "wgrad", text, name, size, inputs, backward, flops)
