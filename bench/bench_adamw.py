"""AdamW: reads parameter, gradient and both averages, writes all but the gradient. gradient_norm
reads the gradients."""

import torch

from bench import Case
from redline import ops
from redline.optim import AdamW

COUNT = {"cuda": 64, "cpu": 16}  # tensors
SIZES = {"cuda": (2048, 2048), "cpu": (512, 1024)}


def parameters_of(shape, count, device, dtype):
    parameters = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    for parameter in parameters:
        parameter.requires_grad_().grad = torch.randn_like(parameter)
    return parameters


def step_of(kind, **options):
    """One optimiser per input set, made on first use."""
    made = {}

    def call(*parameters):
        key = id(parameters[0])
        if key not in made:
            graph = parameters[0].is_cuda
            lr = torch.tensor(1e-3, device="cuda") if graph else 1e-3
            made[key] = kind(parameters, lr=lr, capturable=graph, **options)
        made[key].step()

    return call


def norm_by_torch(*gradients):
    return torch.nn.utils.get_total_norm(gradients)


def cases(device):
    shape, count = SIZES[device], COUNT[device]
    elements = count * shape[0] * shape[1]
    name = f"{count} x {shape[0]} x {shape[1]}"
    for label, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        make = lambda d=dtype: tuple(parameters_of(shape, count, device, d))  # noqa: E731
        average = dtype.itemsize  # torch's averages have the parameter's dtype
        calls = {
            "redline": step_of(AdamW, state_dtype=dtype),
            "eager": step_of(torch.optim.AdamW, fused=True),
        }
        size = elements * (3 * dtype.itemsize + 4 * average)
        yield Case("adamw_step", "step", name, label, size, make, calls)
        gradients = lambda d=dtype: tuple(  # noqa: E731
            torch.randn(shape, device=device, dtype=d) for _ in range(count)
        )
        calls = {"redline": lambda *g: ops.gradient_norm(g), "eager": norm_by_torch}
        size = elements * dtype.itemsize
        yield Case("gradient_norm", "norm", name, label, size, gradients, calls)
