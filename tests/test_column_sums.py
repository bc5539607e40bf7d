"""Sums over many rows: every gradient that has one, held to twice stock torch's error."""

import pytest
import torch
import torch.nn.functional as F

import contract
import reference
from cases import DEVICES, randn, wide
from redline import ops
from tolerance import assert_close

ROWS, COLS = 4096, 1024


def gated(x, bias, row_scale):
    gate, linear = (x + bias).chunk(2, -1)
    return F.silu(gate) * linear * row_scale[:, None]


def dropout_add(x, bias, residual):
    return ops.bias_dropout_add(x, bias, residual, 0.0)


# name: (op, stock, float64, shapes of the inputs after x [ROWS, COLS])
OPS = {
    "rms_norm": (
        ops.rms_norm,
        lambda x, weight: F.rms_norm(x, (COLS,), weight, 1e-5),
        reference.rms_norm,
        [(COLS,)],
    ),
    "layer_norm": (
        ops.layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (COLS,), weight, bias, 1e-5),
        reference.layer_norm,
        [(COLS,), (COLS,)],
    ),
    "activation": (
        lambda x, bias: ops.activation(x, bias, "silu"),
        lambda x, bias: F.silu(x + bias),
        lambda x, bias: reference.activation(x, bias, "silu"),
        [(COLS,)],
    ),
    "gated_activation": (
        lambda x, bias, row_scale: ops.gated_activation(x, bias=bias, row_scale=row_scale),
        gated,
        lambda x, bias, row_scale: reference.gated_activation(x, bias=bias, row_scale=row_scale),
        [(COLS,), (ROWS,)],
    ),
    "bias_dropout_add": (
        dropout_add,
        lambda x, bias, residual: x + bias + residual,
        lambda x, bias, residual: reference.bias_dropout_add(x, bias, residual, 1.0, 0.0),
        [(COLS,), (ROWS, COLS)],
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_many_rows(name, device):
    op, stock, truth, shapes = OPS[name]
    dtype = torch.float32  # 16-bit gradients round more than their sums do
    given = [randn(ROWS, COLS, dtype=dtype, device=device, shift=0.3)]
    given += [randn(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes, 1)]
    _, grads, upstreams = contract.gradients(op, given)
    theirs = contract.gradients(stock, given, upstreams)[1]
    leaves = wide(*given)
    expected = torch.autograd.grad(truth(*leaves), leaves, upstreams[0].cpu().double())
    for i, (ours, wanted, other) in enumerate(zip(grads, expected, theirs, strict=True)):
        what = f"{name}: gradient of input {i}"
        assert_close(ours.cpu(), wanted, stock=other.cpu(), what=what)
