"""gemm at the products of Llama-3-8B and -70B: the three directions against torch.matmul, and what
an epilogue adds to the bare product in the same run. `bytes` of an epilogue's row are what it moves
beside the product: the floor is both, and GB/s are of all that moves."""

import functools
import itertools

import torch
import torch.nn.functional as F

import redline.ops  # noqa: F401  (registers the ops)
from bench import Case

gemm, gemm_gelu = torch.ops.redline.gemm, torch.ops.redline.gemm_gelu
gemm_into = torch.ops.redline.gemm_into

# (in, out) of the projections: q, k and v; attention's output; gate and up; down.
SHAPES = {
    "8B": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)],
    "70B": [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)],
}
SHAPES_CPU = {"small": [(256, 768), (512, 512)]}
TOKENS, TOKENS_CPU = (4096, 16384), (512,)


def forward(x, weight, _):
    return gemm(x, weight.t())


def input_grad(_, weight, y_grad):
    return gemm(y_grad, weight)


def weight_grad(x, _, y_grad):
    return gemm(y_grad.t(), x)


DIRECTIONS = {
    "fwd": (forward, lambda x, weight, _: x @ weight.t()),
    "dgrad": (input_grad, lambda _, weight, y_grad: y_grad @ weight),
    "wgrad": (weight_grad, lambda x, _, y_grad: y_grad.t() @ x),
}


def with_bias(x, weight, bias):
    return gemm(x, weight.t(), bias=bias)


def with_gelu(x, weight, bias):
    return gemm_gelu(x, weight.t(), bias=bias)


def with_gelu_eager(x, weight, bias):
    pre = F.linear(x, weight, bias)
    return F.gelu(pre, approximate="tanh"), pre


def with_gelu_grad(y_grad, weight, pre):
    return gemm(y_grad, weight, epilogue="gelu_grad", pre_activation=pre)


def with_gelu_grad_eager(y_grad, weight, pre):
    return torch.ops.aten.gelu_backward(y_grad @ weight, pre, approximate="tanh")


def into_main_grad(main_grad, y_grad, x):
    gemm_into(main_grad, y_grad.t(), x)
    return main_grad


def into_main_grad_eager(main_grad, y_grad, x):
    return main_grad.add_(y_grad.t() @ x)


def into_both_grads(main_grad, y_grad, x):
    bias_grad = main_grad.new_empty(main_grad.shape[0])
    gemm_into(main_grad, y_grad.t(), x, bias_grad=bias_grad)
    return main_grad, bias_grad


def into_both_grads_eager(main_grad, y_grad, x):
    return into_main_grad_eager(main_grad, y_grad, x), y_grad.sum(0)


def into_both_grads_apart(main_grad, y_grad, x):
    gemm_into(main_grad, y_grad.t(), x)
    return main_grad, y_grad.sum(0)


def bare(a, b, _):
    return a @ b.t()


def bare_input_grad(y_grad, weight, _):
    return y_grad @ weight


def bare_weight_grad(_, y_grad, x):
    return y_grad.t() @ x


def epilogues(rows, cols, out, dtype):
    """(name, direction, bytes beside the product, shapes, calls)."""
    width = dtype.itemsize
    weight, x, y = (out, cols), (rows, cols), (rows, out)
    yield (
        *("gemm bias", "fwd", out * width, (x, weight, (out,))),
        {"redline": with_bias, "products": bare, "eager": lambda a, w, b: F.linear(a, w, b)},
    )
    yield (
        *("gemm gelu", "fwd", (rows + 1) * out * width, (x, weight, (out,))),
        {"redline": with_gelu, "products": bare, "eager": with_gelu_eager},
    )
    yield (
        *("gemm gelu_grad", "dgrad", rows * cols * width, (y, weight, x)),
        {"redline": with_gelu_grad, "products": bare_input_grad, "eager": with_gelu_grad_eager},
    )
    beside = out * cols * (2 * torch.float32.itemsize - width)
    yield (
        *("gemm main_grad", "wgrad", beside, (weight, y, x)),
        {"redline": into_main_grad, "products": bare_weight_grad, "eager": into_main_grad_eager},
    )
    yield (
        *("gemm main_grad, bias", "wgrad", beside, (weight, y, x)),
        {
            "redline": into_both_grads,
            "products": bare_weight_grad,
            "apart": into_both_grads_apart,
            "eager": into_both_grads_eager,
        },
    )


def cases_of(text, rows, cols, out, device):
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")

    def draw(shapes, buffer=False):
        given = [torch.randn(*shape, device=device, dtype=dtype) for shape in shapes]
        return (given[0].float(), *given[1:]) if buffer else tuple(given)

    size = (rows * cols + out * cols + rows * out) * dtype.itemsize
    flops = 2 * rows * cols * out
    all_three = ((rows, cols), (out, cols), (rows, out))
    for direction, (ours, stock) in DIRECTIONS.items():
        calls = {"redline": ours, "eager": stock}
        yield Case("gemm", direction, text, name, size, lambda: draw(all_three), calls, flops)
    for op, direction, beside, shapes, calls in epilogues(rows, cols, out, dtype):
        make = functools.partial(draw, shapes, "main_grad" in op)
        moved = size + beside
        yield Case(op, direction, text, name, beside, make, calls, flops, moved=moved)


def cases(device):
    cuda = device == "cuda"
    for model, shapes in (SHAPES if cuda else SHAPES_CPU).items():
        for rows, (cols, out) in itertools.product(TOKENS if cuda else TOKENS_CPU, shapes):
            yield from cases_of(f"{model} {rows} x {cols} to {out}", rows, cols, out, device)
