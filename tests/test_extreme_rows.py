"""Rows that are equal, huge, tiny, infinite or NaN: forward and backward as stock in float64, each
result rounded once. What differs stands in docs/numerics.md."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import contract
from cases import DEVICES, EXTREME, STOCK_ACTIVATIONS, extreme_rows, randn
from redline import ops
from tolerance import assert_close

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"]),
]

COLS, VOCABULARY = 256, 32
# Rows whose numbers, and sum of numbers, have squares that overflow float32.
OVERFLOWING = ("huge",)
# Ops whose derivative squares x: of those rows it is NaN, as stock's is in float32.
OVERFLOWING_SQUARES = ("activation-gelu", "gated_activation-geglu")
# What a promise is given, and the losses' upstream gradient.
UPSTREAM = randn(len(EXTREME), dtype=torch.float32, device="cpu", seed=9)


@dataclass(frozen=True)
class Case:
    """ours(x, *extra) and stock's form of it, for a stock that is given float64."""

    ours: Callable
    stock: Callable
    extra: tuple = ()  # shapes
    roundings: int = 1


def norms():
    def rms(x, weight):
        return F.rms_norm(x, (COLS,), weight, 1e-5)

    def layer(x, *parameters):
        return F.layer_norm(x, (COLS,), *parameters, 1e-5)

    one, two = ((COLS,),), ((COLS,), (COLS,))
    residual = {"roundings": 3}
    return {
        "rms_norm": Case(ops.rms_norm, rms, one),
        "layer_norm": Case(ops.layer_norm, layer, two),
        "residual_rms_norm": Case(
            lambda x, w: ops.residual_rms_norm(x, torch.ones_like(x), w)[0],
            lambda x, w: rms(x + 1, w),
            one,
            **residual,
        ),
        "residual_layer_norm": Case(
            lambda x, *w: ops.residual_layer_norm(x, torch.ones_like(x), *w)[0],
            lambda x, *w: layer(x + 1, *w),
            two,
            **residual,
        ),
        "bias_dropout_residual_rms_norm": Case(
            lambda x, b, w: ops.bias_dropout_residual_rms_norm(x, b, torch.ones_like(x), 0.0, w)[0],
            lambda x, b, w: rms(x + b + 1, w),
            two,
            **residual,
        ),
        "bias_dropout_residual_layer_norm": Case(
            lambda x, b, *w: ops.bias_dropout_residual_layer_norm(
                x, b, torch.ones_like(x), 0.0, *w
            )[0],
            lambda x, b, *w: layer(x + b + 1, *w),
            (*two, (COLS,)),
            **residual,
        ),
    }


GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "quick_geglu": "quick_gelu"}


def clamped_swiglu(x):
    """By minimum(), through whose derivative a NaN passes; clamp's is 0 there."""
    gate, linear = x.chunk(2, -1)
    gate = torch.minimum(gate, gate.new_tensor(7.0))
    return gate * torch.sigmoid(1.702 * gate) * (linear.clamp(-7, 7) + 1)


def activations():
    def plain(kind):
        return Case(
            lambda x, bias: ops.activation(x, bias, kind),
            lambda x, bias: STOCK_ACTIVATIONS[kind](x + bias),
            ((COLS,),),
        )

    def gated(kind):
        def stock(x):
            gate, linear = x.chunk(2, -1)
            return STOCK_ACTIVATIONS[GATES[kind]](gate) * linear

        return Case(
            lambda x: ops.gated_activation(x, kind=kind),
            clamped_swiglu if kind == "clamped_swiglu" else stock,
        )

    cases = {f"activation-{kind}": plain(kind) for kind in STOCK_ACTIVATIONS}
    return cases | {f"gated_activation-{kind}": gated(kind) for kind in (*GATES, "clamped_swiglu")}


def rows():
    """Targets and a head that all rows have."""
    targets = torch.arange(len(EXTREME))

    def stock_head(x, weight):
        return F.cross_entropy(x @ weight.T, targets, reduction="none")

    def head(x, weight, **options):
        place = targets.to(x.device)
        return ops.fused_linear_cross_entropy(x, weight, place, reduction="none", **options)

    def loss(x, **options):
        return ops.cross_entropy(x, targets.to(x.device), "none", **options)

    def stock_loss(x):
        return F.cross_entropy(x, targets, reduction="none")

    of_head = {"extra": ((VOCABULARY, COLS),), "roundings": 4}
    return {
        "softmax": Case(ops.softmax, lambda x: torch.softmax(x, -1), roundings=2),
        "bias_dropout_add": Case(
            lambda x, b: ops.bias_dropout_add(x, b, torch.ones_like(x), 0.0),
            lambda x, b: x + b + 1,
            ((COLS,),),
        ),
        "rotary": Case(lambda x: turned(x, ops.rotary), lambda x: turned(x, stock_rotary)),
        "cross_entropy": Case(loss, stock_loss),
        "cross_entropy-promised": Case(
            lambda x: loss(x, loss_scale=UPSTREAM.to(x.device)), stock_loss
        ),
        "fused_linear_cross_entropy": Case(head, stock_head, **of_head),
        "fused_linear_cross_entropy-promised": Case(
            lambda x, w: head(x, w, loss_scale=UPSTREAM.to(x.device)), stock_head, **of_head
        ),
    }


def turned(x, rotary):
    """Each row is a token of heads of 16."""
    angles = torch.arange(len(x) * 8.0, device=x.device).view(-1, 8)
    return rotary(x.view(1, len(x), -1, 16), angles.cos(), angles.sin()).view(x.shape)


def stock_rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


CASES = norms() | activations() | rows()


def results(op, inputs, upstreams=None):
    """Outputs, x's gradient, and the upstream gradients: UPSTREAM of a loss for each row."""
    if op(*inputs).dim() == 1:
        upstreams = [UPSTREAM.to(inputs[0].device)]
    (y,), (x_grad, *_), upstreams = contract.gradients(op, inputs, upstreams)
    return y, x_grad, upstreams


@pytest.mark.parametrize("name", CASES)
def test_extreme_rows_follow_stock(name, dtype, device):
    case = CASES[name]
    x = extreme_rows(COLS, dtype, device)
    extra = [
        randn(*shape, dtype=dtype, device=device, seed=i, scale=0.5)
        for i, shape in enumerate(case.extra)
    ]
    y, x_grad, upstreams = results(case.ours, [x, *extra])
    given = [tensor.cpu().double() for tensor in (x, *extra)]
    truth = results(case.stock, given, [upstream.cpu().double() for upstream in upstreams])
    for row, kind in enumerate(EXTREME):
        if "norm" in name and kind in OVERFLOWING:
            assert_overflowed(y[row], x_grad[row], extra[-1] if "layer" in name else None)
            continue
        if name in OVERFLOWING_SQUARES and kind in OVERFLOWING:
            stock = contract.gradients(case.stock, [tensor.cpu().float() for tensor in (x, *extra)])
            assert stock[1][0][row].isnan().any()
            truth[1][row, stock[1][0][row].isnan()] = float("nan")
        for what, ours, expected in (("y", y, truth[0]), ("x_grad", x_grad, truth[1])):
            rounded = expected[row].to(ours.dtype).double()  # what is too large becomes infinite
            roundings = case.roundings + ("norm" in name and what == "x_grad")
            where = f"{kind} {what}"
            assert_close(ours[row].cpu(), rounded, dtype, roundings=roundings, sums=400, what=where)


def assert_overflowed(y, x_grad, bias):
    """The reciprocal of an infinite root is zero."""
    assert torch.equal(y, torch.zeros_like(y) if bias is None else bias)
    assert not x_grad.any()


@pytest.mark.parametrize("name", ["bias_dropout_add", "bias_dropout_residual_rms_norm"])
def test_a_dropped_element_is_zero_whatever_it_was(name, dtype, device):
    """Stock multiplies by the mask: what is infinite or NaN becomes NaN."""
    shape = (8, 64)
    residual = torch.ones(shape, device=device, dtype=dtype)

    def summed(x):
        torch.manual_seed(5)
        if name == "bias_dropout_add":
            return ops.bias_dropout_add(x, None, residual, 0.5)
        return ops.bias_dropout_residual_rms_norm(x, None, residual, 0.5, residual[0])[1]

    kept = summed(torch.ones_like(residual)) != 1
    assert 0.3 < kept.float().mean() < 0.7
    for value in (float("inf"), float("-inf"), float("nan")):
        x = torch.full_like(residual, value).requires_grad_()
        y = summed(x)
        assert torch.equal(y[~kept], residual[~kept]) and not y[kept].isfinite().any()
        (x_grad,) = torch.autograd.grad(y, x, residual)
        assert torch.equal(x_grad, 2 * kept.to(dtype))
