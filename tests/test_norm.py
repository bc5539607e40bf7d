"""rms_norm, layer_norm and their residual forms against float64."""

import pytest
import torch
import torch.nn.functional as F

import cases
import contract
import reference
from cases import DEVICES, DTYPES, HUGE, MODEL, SMALL, randn, strided, wide
from redline import ops
from tolerance import assert_close

NORMS = ["rms_norm", "layer_norm"]
# A width for each way in which threads share a row, and rows enough for several per block. Up to
# 512 rows, 1024 wide ones, CUDA's backward has another kernel (norm/few_rows.cu).
TILES = [(5, 504), (5, 1016), (300, 4096), (520, 64), (520, 127), (520, 200), (520, 255)]
TILES += [(520, 1001), (1030, 2048), (1030, 4100), (5, 8184), (3, 16384)]


def parameters(norm, cols, dtype, device):
    """weight, and bias for layer_norm."""
    names = ["weight"] if norm == "rms_norm" else ["weight", "bias"]
    return [randn(cols, dtype=dtype, device=device, seed=i, shift=0.5) for i, _ in enumerate(names)]


def stock(norm, x, *parameters):
    weight, bias = (*parameters, None, None)[:2]
    if norm == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def sums(cols):
    """float32 roundings of a mean over cols, added in lanes: measured growth is the square root."""
    return 8 + cols**0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SMALL + MODEL[:1] + TILES + HUGE, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_forward(norm, case, dtype, device):
    x = randn(*case, dtype=dtype, device=device, shift=0.3)
    inputs = [x, *parameters(norm, case[1], dtype, device)]
    y = getattr(ops, norm)(*inputs)
    expected = getattr(reference, norm)(*wide(*inputs))
    theirs = stock(norm, *inputs).cpu() if case[0] else None
    assert_close(y.cpu(), expected, sums=sums(case[1]), stock=theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SMALL + MODEL[:1] + TILES + HUGE, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_backward(norm, case, dtype, device):
    x = randn(*case, dtype=dtype, device=device, shift=0.3)
    inputs = [x, *parameters(norm, case[1], dtype, device)]
    _, grads, upstreams = contract.gradients(getattr(ops, norm), inputs)
    leaves = wide(*inputs)
    expected = torch.autograd.grad(
        getattr(reference, norm)(*leaves), leaves, upstreams[0].cpu().double()
    )
    theirs = contract.gradients(lambda *args: stock(norm, *args), inputs, upstreams)[1]
    for name, ours, truth, other in zip(
        ("x", "weight", "bias"), grads, expected, theirs, strict=False
    ):
        assert ours.dtype == dtype
        rows = case[0] if name != "x" else 0
        if case[1] > 1 or name != "x":  # one column: the gradient of x is zero but for rounding
            assert_close(
                ours.cpu(), truth, sums=4 * sums(case[1]) + rows, stock=other.cpu(), what=name
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case",
    [(5, 255), (3, 4097), (2, 20000), (520, 128), (520, 255), (520, 1001)],
    ids=cases.name,
)
@pytest.mark.parametrize("norm", NORMS)
def test_residual_has_the_bits_of_norm_of_the_sum(norm, case, dtype, device):
    x = randn(*case, dtype=dtype, device=device)
    residual = randn(*case, dtype=dtype, device=device, seed=9)
    extra = parameters(norm, case[1], dtype, device)
    y, total = getattr(ops, f"residual_{norm}")(x, residual, *extra)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, getattr(ops, norm)(x + residual, *extra))
    fused = contract.gradients(getattr(ops, f"residual_{norm}"), [x, residual, *extra])
    assert torch.equal(fused[1][0], fused[1][1])
    leaves = wide(x, residual, *extra)
    s = leaves[0] + leaves[1]
    if dtype != torch.float32:  # the sum is rounded before it is normalised
        s = s + (total.double().cpu() - s).detach()
    truth = torch.autograd.grad(
        (getattr(reference, norm)(s, *leaves[2:]), s), leaves, [u.cpu().double() for u in fused[2]]
    )
    for ours, expected in zip(fused[1], truth, strict=True):
        assert_close(ours.cpu(), expected, sums=4 * sums(case[1]) + case[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(5, cols) for cols in (1, 128, 255, 1016, 4097, 8184, 16384, 140000)]
    + [(520, cols) for cols in (128, 255, 1016)]
    + [(1030, 4097)],
)
@pytest.mark.parametrize("norm", NORMS)
def test_backward_rebuilds_the_output(norm, rows, cols, dtype, device):
    """forward's y out of backward's kernel, with its bits, beside gradients with theirs."""
    inner = torch.ops.redline
    for aligned in (True, False):
        x, y_grad, sum_grad = (
            randn(rows, cols + 1, dtype=dtype, device=device, seed=seed)[:, 1:]
            for seed in (1, 2, 3)
        )
        if aligned:
            x, y_grad, sum_grad = (tensor.contiguous() for tensor in (x, y_grad, sum_grad))
        weight, bias = (*parameters(norm, cols, torch.float32, device), None)[:2]
        if norm == "rms_norm":
            y, _, inverse = inner.rms_norm_forward(x, None, weight, 1e-5, True, None)
            given, mean = (y_grad, x, weight, inverse, sum_grad, True, None, True), None
        else:
            y, _, mean, inverse = inner.layer_norm_forward(x, None, weight, bias, 1e-5, True, None)
            given = (y_grad, x, weight, bias, mean, inverse, sum_grad, True, None, True, True)
        expected = getattr(inner, f"{norm}_backward")(*given)
        *grads, again = inner.norm_backward_rebuild(
            y_grad, x, weight, bias, mean, inverse, sum_grad, True, True, norm == "layer_norm"
        )
        contract.equal_bits([*grads[: len(expected)], again], [*expected, y])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [6, 520])
@pytest.mark.parametrize("norm", NORMS)
def test_mixed_dtypes(norm, rows, device):
    """bf16 x with float32 parameters, and a float32 residual under bf16 x."""
    x = randn(rows, 300, dtype=torch.bfloat16, device=device)
    residual = randn(rows, 300, dtype=torch.float32, device=device, seed=3)
    extra = parameters(norm, 300, torch.float32, device)
    outs, grads, upstreams = contract.gradients(
        getattr(ops, f"residual_{norm}"), [x, residual, *extra]
    )
    assert [out.dtype for out in outs] == [torch.bfloat16, torch.float32]
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + [torch.float32] * (1 + len(extra))
    leaves = wide(x, residual, *extra)
    s = leaves[0] + leaves[1]
    y = getattr(reference, norm)(s, *leaves[2:])
    assert_close(outs[0].cpu(), y.detach())
    assert_close(outs[1].cpu(), s.detach())
    truth = torch.autograd.grad((y, s), leaves, [u.cpu().double() for u in upstreams])
    for ours, expected in zip(grads, truth, strict=True):
        assert_close(ours.cpu(), expected, sums=200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_centered_and_missing_parameters(norm, device):
    x = randn(4, 130, dtype=torch.float32, device=device)
    extra = parameters(norm, 130, torch.float32, device)
    function = getattr(ops, norm)
    zero_centered = function(x, *extra, zero_centered=True)
    extra[0] = extra[0] + 1
    assert_close(zero_centered.cpu(), function(x, *extra).cpu().double(), roundings=4)
    assert_close(function(x).cpu(), getattr(reference, norm)(*wide(x)).detach(), sums=20)
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_bits_do_not_depend_on_strides_threads_or_neighbours(norm, dtype, device):
    x = randn(40, 999, dtype=dtype, device=device)
    extra = parameters(norm, 999, dtype, device)
    function = getattr(ops, norm)
    for rows in (300, 600):  # few on CUDA, and many
        contract.same_bits(function, [randn(rows, 999, dtype=dtype, device=device), *extra])
    many = randn(520, 999, dtype=dtype, device=device)
    contract.gradient_ignores_strides_and_neighbours(function, [many, *extra], range(0, 520, 40))
    contract.gradient_ignores_strides_and_neighbours(function, [x, *extra])
    y = function(x, *extra)
    assert torch.equal(function(strided(x), *[strided(e) for e in extra]), y)
    assert torch.equal(
        function(x.view(4, 10, 999).transpose(0, 1), *extra), y.view(4, 10, 999).transpose(0, 1)
    )
    for row in range(40):
        assert torch.equal(function(x[row], *extra), y[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cols", [1032, 2056, 4096, 5000, 8192])
def test_a_row_is_the_same_among_many(norm, cols, device):
    """Few rows of a width and many of it are other kernels on CUDA."""
    x = randn(1200, cols, dtype=torch.bfloat16, device=device)
    extra = parameters(norm, cols, torch.bfloat16, device)
    (y,), grads, (upstream,) = contract.gradients(getattr(ops, norm), [x, *extra])
    for row in (slice(0, 1), slice(600, 604), slice(1199, 1200)):
        alone = contract.gradients(getattr(ops, norm), [x[row], *extra], [upstream[row]])
        assert torch.equal(alone[0][0], y[row]) and torch.equal(alone[1][0], grads[0][row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "cols"), [(torch.bfloat16, 18432), (torch.bfloat16, 25088), (torch.float32, 9216)]
)
def test_wide_rows_far_from_zero(norm, dtype, cols, device):
    """Widths of which some warps of a cluster hold nothing: no mean of theirs may count."""
    x = randn(3, cols, dtype=dtype, device=device, shift=10.0)
    extra = parameters(norm, cols, dtype, device)
    truth = getattr(reference, norm)(*wide(x, *extra)).detach()
    assert_close(getattr(ops, norm)(x, *extra).cpu(), truth, sums=40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cols", [65, 250, 1032])
@pytest.mark.parametrize("rows", [9, 600])
@pytest.mark.parametrize("norm", NORMS)
def test_row_count_on_the_device(norm, rows, cols, device):
    x = randn(rows, cols, dtype=torch.bfloat16, device=device)
    held = rows - 4
    count = torch.tensor(held, device=device)
    extra = parameters(norm, cols, torch.bfloat16, device)
    outs, grads, up = contract.gradients(
        lambda *args: getattr(ops, norm)(*args, row_count=count), [x, *extra]
    )
    some = contract.gradients(getattr(ops, norm), [x[:held], *extra], [up[0][:held]])
    assert torch.equal(outs[0][:held], some[0][0]) and not outs[0][held:].any()
    assert torch.equal(grads[0][:held], some[1][0]) and not grads[0][held:].any()
    for ours, theirs in zip(grads[1:], some[1][1:], strict=True):
        assert_close(ours.cpu(), theirs.cpu().double(), roundings=2)


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, r = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.rms_norm, (x, w))
    assert torch.autograd.gradcheck(ops.layer_norm, (x, w, b))
    assert torch.autograd.gradcheck(ops.residual_rms_norm, (x, r, w))
    assert torch.autograd.gradcheck(ops.residual_layer_norm, (x, r, w, b))


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, r = (torch.randn(4, 3, 8, device=device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    registered = torch.ops.redline
    contract.passes_opcheck(registered.rms_norm, (x, w))
    contract.passes_opcheck(registered.layer_norm, (x, w, b))
    contract.passes_opcheck(registered.residual_rms_norm, (x, r, w))
    contract.passes_opcheck(registered.residual_layer_norm, (x, r, w, b))
    x, w, b = x.detach(), w.detach(), b.detach()
    rms, stat = (w, 1e-5, False, None), torch.rand(4, 3, device=device)
    contract.passes_opcheck(registered.rms_norm_forward, (x, None, *rms), inner=True)
    contract.passes_opcheck(
        registered.rms_norm_backward, (x, x, w, stat, None, False, None, True), inner=True
    )
    contract.passes_opcheck(
        registered.layer_norm_forward, (x, r.detach(), w, b, 1e-5, False, None), inner=True
    )
    contract.passes_opcheck(
        registered.layer_norm_backward,
        (x, x, w, b, stat, stat, None, False, None, True, True),
        inner=True,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [*NORMS, "residual_rms_norm"])
def test_tracing(norm, device):
    inputs = [randn(6, 3, 40, dtype=torch.float32, device=device)]
    inputs += [inputs[0] + 1] * norm.startswith("residual")
    inputs += [randn(40, dtype=torch.float32, device=device)]
    function = getattr(ops, norm)
    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    contract.refuses_double_backward(function, inputs)
    contract.refuses_a_tangent_in_backward(function, inputs)
    if device == "cuda":
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_follows_stock(norm, device):
    x = randn(4, 32, dtype=torch.bfloat16, device=device)
    extra = parameters(norm, 32, torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert getattr(ops, norm)(x, *extra).dtype == stock(norm, x, *extra).dtype


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x, w = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    for arguments, message in [
        ((x, w[:7]), "rms_norm: x: expected a last dimension of 7, not 8"),
        ((x, w.double()), "rms_norm: weight: expected float32, not float64"),
        ((x.long(),), "rms_norm: x: expected a floating dtype, not Long"),
        ((x[0, 0],), "rms_norm: x: expected at least one dimension, not a scalar"),
        ((x, w, -1.0), "rms_norm: epsilon: expected 0 or more, not -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.rms_norm(*arguments)
    with pytest.raises(
        RuntimeError, match=r"layer_norm: residual: expected \[4, 8\], not \[4, 7\]"
    ):
        ops.residual_layer_norm(x, x[:, :7], w, w)
    with pytest.raises(RuntimeError, match="layer_norm: residual: expected float32, not bfloat16"):
        ops.residual_layer_norm(x, x.bfloat16(), w, w)
    statistic, inner = torch.ones(4, device=device), torch.ops.redline
    with pytest.raises(RuntimeError, match="rms_norm: needs_weight: expected weight to be given"):
        inner.rms_norm_backward(x, x, None, statistic, None, False, None, True)
    rest = (statistic, statistic, None, False, None)
    for given, message in (((None, w), "needs_weight"), ((w, None), "needs_bias")):
        with pytest.raises(RuntimeError, match=f"layer_norm: {message}: expected"):
            inner.layer_norm_backward(x, x, *given, *rest, True, True)
    with pytest.raises(RuntimeError, match="row_count: expected one int64"):
        ops.rms_norm(x, w, row_count=torch.tensor(1.0, device=device))
    if device == "cuda":
        with pytest.raises(RuntimeError, match="weight: expected a tensor on cuda:0, not on cpu"):
            ops.rms_norm(x, w.cpu())
        with pytest.raises(RuntimeError, match="no kernel for float64"):
            ops.rms_norm(x.double())
