"""AdamW: reads parameter, gradient and both averages, writes all but the gradient; with a master,
that is read and written, and the parameter only written. A norm reads the gradients; scaling them
by itself, which a step that takes the coefficient does without, reads and writes them."""

import functools

import torch

from bench import Case
from redline import ops
from redline.optim import AdamW

# (tensors, shape); the second is 1.07e9 parameters.
SIZES = [(64, (2048, 2048)), (300, (1024, 3488))]
SIZES_CPU = [(16, (512, 1024))]
COMPILED = 64  # tensors at most: inductor takes minutes for hundreds
LEARNING_RATE = 1.0  # a step shows in the parameters, where results are compared


class StockWithMasters:
    """torch's fused step of float32 masters: gradients are widened before, parameters follow."""

    def __init__(self, parameters, **options):
        self.parameters = parameters
        self.masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, **options)

    @torch.no_grad()
    def step(self):
        gradients = [parameter.grad for parameter in self.parameters]
        torch._foreach_copy_([master.grad for master in self.masters], gradients)
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)


def step_of(kind, compiled=False, **options):
    """One optimiser's step per input set, made on first use."""
    steps = {}

    def call(*parameters):
        key = id(parameters[0])
        if key not in steps:
            graph = parameters[0].is_cuda
            lr = torch.tensor(LEARNING_RATE, device="cuda") if graph else LEARNING_RATE
            step = kind(parameters, lr=lr, capturable=graph, **options).step
            steps[key] = torch.compile(step) if compiled else step
        steps[key]()
        return parameters

    return call


# (name, of parameters and gradients, bytes per parameter, ours, stock); torch's averages have the
# parameter's dtype.
STEPS = [
    ("f32", torch.float32, 28, {}, torch.optim.AdamW),
    ("bf16", torch.bfloat16, 14, {"state_dtype": torch.bfloat16}, torch.optim.AdamW),
    ("bf16 master", torch.bfloat16, 28, {"master": True}, StockWithMasters),
]


def coefficient(*gradients):
    return ops.clip_coefficient(ops.gradient_norm(gradients), 1.0)


def coefficient_by_torch(*gradients):
    return torch.clamp(1.0 / (torch.nn.utils.get_total_norm(gradients) + 1e-6), max=1.0)


def scale(*gradients, factor):
    ops.scale_gradients(gradients, factor)
    return gradients


def scale_by_torch(*gradients, factor):
    torch._foreach_mul_(gradients, factor)
    return gradients


def with_compiled(count, ours, eager):
    compiled = {"compile": torch.compile(eager, dynamic=False)} if count <= COMPILED else {}
    return {"redline": ours, "eager": eager, **compiled}


def parameters_of(count, shape, device, dtype):
    parameters = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    for parameter in parameters:
        parameter.requires_grad_().grad = torch.randn_like(parameter)
    return tuple(parameters)


def cases(device):
    factor = torch.tensor(-1.0, device=device)  # 1 is left out by ours, and others grow or vanish
    for count, shape in SIZES if device == "cuda" else SIZES_CPU:
        elements, text = count * torch.Size(shape).numel(), f"{count} x {shape[0]} x {shape[1]}"
        for label, dtype, size, ours, stock in STEPS:
            make = functools.partial(parameters_of, count, shape, device, dtype)
            calls = {"redline": step_of(AdamW, **ours), "eager": step_of(stock, fused=True)}
            if count <= COMPILED:
                calls["compile"] = step_of(stock, compiled=True, foreach=True)
            yield Case("adamw_step", "step", text, label, elements * size, make, calls)
        for label, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):

            def draw(count=count, shape=shape, dtype=dtype):
                return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))

            size = elements * dtype.itemsize
            calls = with_compiled(count, coefficient, coefficient_by_torch)
            yield Case("clip_grad_norm", "coeff", text, label, size, draw, calls)
            forms = (functools.partial(form, factor=factor) for form in (scale, scale_by_torch))
            calls = with_compiled(count, *forms)
            yield Case("scale_gradients", "scale", text, label, 2 * size, draw, calls)
