"""activation against float64."""

import functools

import pytest
import torch
import torch.nn.functional as F

import cases
import contract
import reference
from cases import DEVICES, DTYPES, MODEL, SMALL, STOCK_ACTIVATIONS, randn, strided, wide
from redline import ops
from tolerance import assert_close

# Roundings of float32 arithmetic itself, where no wider type stands behind the result.
SUMS = 4


def stock(kind, x, bias=None):
    return STOCK_ACTIVATIONS[kind](x if bias is None else x + bias)


def inputs(case, dtype, device, bias=True, **options):
    x = randn(*case, dtype=dtype, device=device, scale=2.0, **options)
    return [x, randn(case[-1], dtype=dtype, device=device, seed=5)] if bias else [x]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", STOCK_ACTIVATIONS)
def test_forward_and_backward(kind, bias, dtype, device):
    for case in SMALL + MODEL[:1]:
        given = inputs(case, dtype, device, bias)
        outs, grads, upstreams = contract.gradients(
            lambda *args: ops.activation(*args, kind=kind), given
        )
        leaves = wide(*given)
        expected = reference.activation(*leaves, kind=kind)
        truth = torch.autograd.grad(expected, leaves, upstreams[0].cpu().double())
        theirs = contract.gradients(lambda *args: stock(kind, *args), given, upstreams)
        where = f"{kind} {cases.name(case)}"
        assert_close(outs[0].cpu(), expected, sums=SUMS, what=where)
        enough = case[0] * case[1] > 200  # one element's error is luck, stock's too
        if enough:
            assert_close(outs[0].cpu(), expected, stock=theirs[0][0].cpu(), what=where)
        for name, ours, wanted, other in zip(("x", "bias"), grads, truth, theirs[1], strict=False):
            assert ours.dtype == dtype
            # a few elements: f' crosses zero at negative x, and its two terms cancel there
            sums = (2 if enough else 8) * SUMS + (case[0] ** 0.5 if name == "bias" else 0)
            assert_close(ours.cpu(), wanted, sums=sums, what=f"{where} {name}")
            if name == "x" and enough:
                assert_close(ours.cpu(), wanted, stock=other.cpu(), what=f"{where} {name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", STOCK_ACTIVATIONS)
def test_mixed_dtypes_and_extremes(kind, device):
    """bf16 x with a float32 bias; zeros, large values, infinity and NaN pass through."""
    x = randn(6, 300, dtype=torch.bfloat16, device=device)
    bias = randn(300, dtype=torch.float32, device=device, seed=3)
    outs, grads, upstreams = contract.gradients(
        lambda *args: ops.activation(*args, kind=kind), [x, bias]
    )
    assert [outs[0].dtype] + [g.dtype for g in grads] == [torch.bfloat16] * 2 + [torch.float32]
    leaves = wide(x, bias)
    expected = reference.activation(*leaves, kind=kind)
    truth = torch.autograd.grad(expected, leaves, upstreams[0].cpu().double())
    assert_close(outs[0].cpu(), expected)
    for ours, wanted in zip(grads, truth, strict=True):
        assert_close(ours.cpu(), wanted, sums=2 * SUMS)
    special = [0.0, -0.0, 1e-40, 30.0, -30.0, 1e4, -1e4, float("inf"), float("nan")]
    edge = torch.tensor(special, device=device)
    y = ops.activation(edge, kind=kind).cpu().double()
    expected = reference.activation(edge.cpu().double(), kind=kind)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_gelu_erf_of_every_value(dtype, device):
    """Half a unit in the last place, and of CUDA's fit 3.3e-5, 0.07 of one; below 2^-126 its e^x is
    zero. Stock is off by 1.7 units."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    y = ops.activation(x.to(device), kind="gelu_erf").cpu().double()
    truth = reference.activation(x.double(), kind="gelu_erf")
    info = torch.finfo(dtype)
    unit = truth.abs().clamp(min=info.smallest_normal).log2().floor().exp2() * info.eps
    most = 0.57 if device == "cuda" else 0.51
    assert ((y - truth).abs() <= most * unit + 2.0**-126).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_strides_threads_or_neighbours(dtype, device):
    x, bias = inputs((40, 999), dtype, device)
    contract.same_bits(ops.activation, [randn(300, 999, dtype=dtype, device=device), bias])
    contract.gradient_ignores_strides_and_neighbours(ops.activation, [x, bias])
    for extra in ((), (bias,)):
        y = ops.activation(x, *extra)
        assert torch.equal(ops.activation(strided(x), *extra), y)
        swapped = x.view(4, 10, 999).transpose(0, 1)
        assert torch.equal(ops.activation(swapped, *extra), y.view(4, 10, 999).transpose(0, 1))
        for row in range(40):
            assert torch.equal(ops.activation(x[row], *extra), y[row])


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for kind in STOCK_ACTIVATIONS:
        assert torch.autograd.gradcheck(functools.partial(ops.activation, kind=kind), (x, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.randn(4, 3, 8, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    registered = torch.ops.redline
    contract.passes_opcheck(registered.activation, (x, bias, "silu"))
    contract.passes_opcheck(registered.activation, (x,))
    x, bias = x.detach(), bias.detach()
    contract.passes_opcheck(registered.activation_forward, (x, bias, "gelu"), inner=True)
    contract.passes_opcheck(registered.activation_backward, (x, x, bias, "gelu", True), inner=True)


@pytest.mark.parametrize("device", DEVICES)
def test_tracing(device):
    given = inputs((6, 3, 40), torch.float32, device)
    contract.compiles(ops.activation, given)
    contract.compiles_dynamic(ops.activation, given)
    contract.exports(ops.activation, given)
    contract.runs_in_inference_mode(ops.activation, given)
    contract.refuses_vmap(ops.activation, given)
    contract.refuses_double_backward(ops.activation, given)
    contract.refuses_a_tangent_in_backward(ops.activation, given)
    if device == "cuda":
        contract.captures(ops.activation, given)
        contract.agrees_on_side_stream(ops.activation, given)
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = given[0].to(dtype)
            assert ops.activation(x).dtype == F.gelu(x).dtype


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x, bias = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    kinds = "gelu, gelu_erf, quick_gelu, silu, relu, squared_relu"
    for arguments, message in [
        ((x, bias[:7]), r"activation: bias: expected \[8\], not \[7\] float32"),
        ((x, bias.double()), "activation: bias: expected float32, not float64"),
        ((x.long(),), "activation: x: expected a floating dtype, not Long"),
        ((x[0, 0],), "activation: x: expected at least one dimension, not a scalar"),
        ((x, bias, "tanh"), f"activation: kind: expected one of {kinds}, not tanh"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.activation(*arguments)
    with pytest.raises(RuntimeError, match="activation: needs_bias: expected bias to be given"):
        torch.ops.redline.activation_backward(x, x, None, "gelu", True)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="bias: expected a tensor on cuda:0, not on cpu"):
            ops.activation(x, bias.cpu())
        with pytest.raises(RuntimeError, match="activation: no kernel for float64"):
            ops.activation(x.double())
