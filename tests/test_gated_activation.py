"""gated_activation and gated_activation_pair against float64."""

import pytest
import torch
import torch.nn.functional as F

import cases
import contract
import reference
from cases import DEVICES, DTYPES, MODEL, SMALL, randn, strided, wide
from redline import ops
from tolerance import assert_close

STOCK = {
    "swiglu": F.silu,
    "geglu": lambda a: F.gelu(a, approximate="tanh"),
    "reglu": F.relu,
    "quick_geglu": lambda a: a * torch.sigmoid(1.702 * a),
    "clamped_swiglu": lambda a: a.clamp(max=7.0) * torch.sigmoid(1.702 * a.clamp(max=7.0)),
}
KINDS = list(STOCK)
# Roundings of float32 arithmetic itself, where no wider type stands behind the result.
SUMS = 6


def stock(x, kind):
    a, b = x.chunk(2, -1)
    return STOCK[kind](a) * (b.clamp(-7, 7) + 1 if kind == "clamped_swiglu" else b)


def inputs(case, dtype, device, extras=("bias", "row_scale")):
    """x [rows, 2 * cols] with some values past the clamp, bias and row_scale."""
    given = [randn(case[0], 2 * case[1], dtype=dtype, device=device, scale=3.0)]
    if "bias" in extras:
        given.append(randn(2 * case[1], dtype=dtype, device=device, seed=5))
    if "row_scale" in extras:
        given.append(randn(case[0], dtype=dtype, device=device, seed=6))
    return given


def packed(kind, extras=("bias", "row_scale"), **options):
    return lambda x, *rest: ops.gated_activation(
        x, kind=kind, **dict(zip(extras, rest, strict=True)), **options
    )


def pair(kind, extras=("bias", "row_scale"), **options):
    def op(x, *rest):
        named = dict(zip(extras, rest, strict=True))
        return ops.gated_activation_pair(*x.chunk(2, -1), kind=kind, **named, **options)

    return op


def truth(kind, given, upstream, extras, **options):
    leaves = wide(*given)
    y = reference.gated_activation(
        leaves[0], kind, **dict(zip(extras, leaves[1:], strict=True)), **options
    )
    return y, torch.autograd.grad(y, leaves, upstream.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "extras", [(), ("bias",), ("row_scale",), ("bias", "row_scale")], ids="-".join
)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, extras, dtype, device):
    for case in SMALL + MODEL[:1] * (extras == ()):
        given = inputs(case, dtype, device, extras)
        outs, grads, up = contract.gradients(packed(kind, extras), given)
        expected, wanted = truth(kind, given, up[0], extras)
        where = f"{kind} {cases.name(case)}"
        assert_close(outs[0].cpu(), expected, sums=SUMS, what=where)
        for name, ours, right in zip(("x", *extras), grads, wanted, strict=True):
            assert ours.dtype == dtype
            terms = {"x": 0, "bias": case[0], "row_scale": case[1]}[name]
            sums = 2 * SUMS + 2 * terms**0.5
            assert_close(ours.cpu(), right, sums=sums, what=f"{where} {name}")
        enough = case[0] * case[1] > 200  # one element's error is luck, stock's too
        if not extras and enough:
            theirs = contract.gradients(lambda x: stock(x, kind), given, up)
            assert_close(outs[0].cpu(), expected, stock=theirs[0][0].cpu(), what=where)
            assert_close(grads[0].cpu(), wanted[0], stock=theirs[1][0].cpu(), what=f"{where} x")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pair_has_the_bits_of_packed(kind, dtype, device):
    for case in [(5, 255), (3, 1025), (40, 64)]:
        given = inputs(case, dtype, device)
        one = contract.gradients(packed(kind), given)
        for function in (pair(kind), lambda x, *rest: pair(kind)(strided(x), *rest)):
            two = contract.gradients(function, given, one[2])
            for ours, theirs in zip(one[0] + one[1], two[0] + two[1], strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_one_tensor_or_two(device):
    x = torch.randn(4, 3, 16, device=device)
    y_grad = torch.randn(4, 3, 8, device=device)
    rest = ("swiglu", None, None, None, None, None, None, False, False)
    one = torch.ops.redline.gated_activation_backward(y_grad, x, None, *rest)
    two = torch.ops.redline.gated_activation_backward(y_grad, *x.chunk(2, -1), *rest)
    assert one[0].shape == x.shape and one[0].is_contiguous() and one[1] is None
    assert torch.equal(torch.cat(two[:2], -1), one[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(kind, device):
    """bf16 x with a float32 bias and row scale."""
    x = randn(6, 600, dtype=torch.bfloat16, device=device)
    rest = [randn(600, dtype=torch.float32, device=device, seed=3)]
    rest += [randn(6, dtype=torch.float32, device=device, seed=4)]
    outs, grads, up = contract.gradients(packed(kind), [x, *rest])
    dtypes = [out.dtype for out in (*outs, *grads)]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected, wanted = truth(kind, [x, *rest], up[0], ("bias", "row_scale"))
    assert_close(outs[0].cpu(), expected)
    for ours, right in zip(grads, wanted, strict=True):
        assert_close(ours.cpu(), right, sums=2 * SUMS + 20)


@pytest.mark.parametrize("device", DEVICES)
def test_clamp_options(device):
    x = randn(9, 130, dtype=torch.float32, device=device, scale=3.0)
    options = {"limit": 1.5, "alpha": 1.0, "linear_offset": 0.0}
    outs, grads, up = contract.gradients(packed("clamped_swiglu", (), **options), [x])
    expected, wanted = truth("clamped_swiglu", [x], up[0], (), **options)
    assert_close(outs[0].cpu(), expected, sums=SUMS)
    assert_close(grads[0].cpu(), wanted[0], sums=SUMS)
    gate, linear = x.chunk(2, -1)
    assert not grads[0].chunk(2, -1)[0][gate > 1.5].any()
    assert not grads[0].chunk(2, -1)[1][linear.abs() > 1.5].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_strides_threads_or_neighbours(dtype, device):
    given = inputs((40, 999), dtype, device)
    for kind in ("swiglu", "geglu"):
        function = packed(kind)
        many = inputs((300, 999), dtype, device)
        contract.same_bits(function, many)
        contract.same_bits(packed(kind, ()), many[:1])
        contract.gradient_ignores_strides_and_neighbours(packed(kind, ("bias",)), given[:2])
        y = function(*given)
        assert torch.equal(function(strided(given[0]), *given[1:]), y)
        for row in range(40):
            alone = function(given[0][row], given[1], given[2][row])
            assert torch.equal(alone, y[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_row_count_on_the_device(kind, device):
    given = inputs((9, 65), torch.bfloat16, device)
    given[0][5:] = float("nan")
    count = torch.tensor(5, device=device)
    outs, grads, up = contract.gradients(packed(kind, row_count=count), given)
    some = contract.gradients(packed(kind), [given[0][:5], given[1], given[2][:5]], [up[0][:5]])
    assert torch.equal(outs[0][:5], some[0][0]) and not outs[0][5:].any()
    for ours, theirs in zip(grads[::2], some[1][::2], strict=True):
        assert torch.equal(ours[:5], theirs) and not ours[5:].any()
    assert_close(grads[1].cpu(), some[1][1].cpu().double())


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    given = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 6), (6,), (3,))
    ]
    for kind in KINDS:
        assert torch.autograd.gradcheck(packed(kind), given)
        assert torch.autograd.gradcheck(pair(kind), given)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.randn(4, 3, 8, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    scale = torch.rand(4, 3, device=device, requires_grad=True)
    registered, given = torch.ops.redline, {"bias": bias, "row_scale": scale}
    contract.passes_opcheck(registered.gated_activation, (x,), given)
    contract.passes_opcheck(registered.gated_activation, (x,), {"kind": "clamped_swiglu"})
    contract.passes_opcheck(
        registered.gated_activation_pair,
        (
            x[..., :4].detach().clone().requires_grad_(),
            torch.randn(4, 3, 4, device=device),
        ),
        given,
    )
    x, bias, scale = x.detach(), bias.detach(), scale.detach()
    rest = ("geglu", bias, scale, None, None, None, None)
    y_grad = torch.randn(4, 3, 4, device=device)
    contract.passes_opcheck(registered.gated_activation_forward, (x, None, *rest), inner=True)
    contract.passes_opcheck(
        registered.gated_activation_backward,
        (y_grad, x, None, *rest, True, True),
        inner=True,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_tracing(device):
    given = [randn(6, 3, 40, dtype=torch.float32, device=device)]
    given += [randn(40, dtype=torch.float32, device=device)]
    given += [randn(6, 3, dtype=torch.float32, device=device)]
    for function in (packed("swiglu"), pair("clamped_swiglu")):
        contract.compiles(function, given)
        contract.compiles_dynamic(function, given)
        contract.exports(function, given)
        contract.runs_in_inference_mode(function, given)
        contract.refuses_vmap(function, given)
        contract.refuses_double_backward(function, given)
        contract.refuses_a_tangent_in_backward(function, given)
        if device == "cuda":
            contract.captures(function, given)
            contract.agrees_on_side_stream(function, given)
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert packed("swiglu", ())(given[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x, bias = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    kinds = "swiglu, geglu, reglu, quick_geglu, clamped_swiglu"
    for given, message in [
        ({"bias": bias[:4]}, r"bias: expected \[8\], not \[4\] float32"),
        ({"bias": bias.double()}, "bias: expected float32, not float64"),
        ({"row_scale": bias}, r"row_scale: expected \[4\], not \[8\] float32"),
        ({"kind": "glu"}, f"kind: expected one of {kinds}, not glu"),
        ({"limit": 7.0}, "limit: expected none with kind swiglu, not 7"),
        (
            {"kind": "geglu", "alpha": 1.0},
            "alpha: expected none with kind geglu, not 1",
        ),
        (
            {"linear_offset": 1.0},
            "linear_offset: expected none with kind swiglu, not 1",
        ),
        (
            {"kind": "clamped_swiglu", "limit": -1.0},
            "limit: expected more than 0, not -1",
        ),
        ({"row_count": bias}, "row_count: expected one int64"),
    ]:
        with pytest.raises(RuntimeError, match=f"gated_activation: {message}"):
            ops.gated_activation(x, **given)
    with pytest.raises(RuntimeError, match="gated_activation: x: expected an even last size"):
        ops.gated_activation(x[:, :7])
    with pytest.raises(RuntimeError, match="gated_activation: x: expected a floating dtype"):
        ops.gated_activation(x.long())
    with pytest.raises(RuntimeError, match=r"linear: expected \[4, 8\], not \[4, 4\]"):
        ops.gated_activation_pair(x, x[:, :4])
    with pytest.raises(RuntimeError, match="linear: expected float32, not bfloat16"):
        ops.gated_activation_pair(x, x.bfloat16())
    for needs in ("bias", "row_scale"):
        wanted = [needs == name for name in ("bias", "row_scale")]
        message = f"gated_activation: needs_{needs}: expected {needs} to be given, or false"
        with pytest.raises(RuntimeError, match=message):
            torch.ops.redline.gated_activation_backward(
                x[:, :4], x, None, "swiglu", *[None] * 6, *wanted
            )
    if device == "cuda":
        with pytest.raises(RuntimeError, match="bias: expected a tensor on cuda:0, not on cpu"):
            ops.gated_activation(x, bias=bias.cpu())
        with pytest.raises(RuntimeError, match="gated_activation: no kernel for float64"):
            ops.gated_activation(x.double())
