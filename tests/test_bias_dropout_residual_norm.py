"""bias_dropout_residual_rms_norm and ..._layer_norm: the bits of their two ops, and float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cases
import contract
import reference
from cases import DEVICES, DTYPES, HUGE, SMALL, randn, strided, wide
from contract import seeded
from redline import ops
from test_bias_dropout_add import P, mask_of, state_of
from tolerance import assert_close

NORMS = ["rms_norm", "layer_norm"]
# A width for each way in which threads share a row, and rows enough for several per block.
# More than 512, or 1024 wide ones: up to there CUDA's backward is two kernels.
TILES = [(40, 256), (300, 512), (520, 64), (520, 256), (1030, 2048), (5, 8184), (3, 16384)]
norms = pytest.mark.parametrize("norm", NORMS)
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def inputs(norm, case, dtype, device, with_bias=True):
    """x, the input bias where there is one, residual, weight and the layer norm's bias."""
    cols = case[-1]
    vectors = [randn(cols, dtype=dtype, device=device, seed=i, shift=0.5) for i in (5, 6, 7)]
    rows = [randn(*case, dtype=dtype, device=device, seed=i, shift=0.3) for i in (1, 2)]
    given = [rows[0], *vectors[: int(with_bias)], rows[1], vectors[1]]
    return given + vectors[2:] * (norm == "layer_norm")


def fused(norm, with_bias=True, probability=P, training=True):
    op = getattr(ops, f"bias_dropout_residual_{norm}")

    def call(x, *rest):
        bias, residual, *parameters = rest if with_bias else (None, *rest)
        return op(x, bias, residual, probability, *parameters, training=training)

    return call


def split(given, with_bias):
    """x, the input bias or None, residual, weight, and the norm's bias or None."""
    x, *rest = given
    bias, residual, weight, *norm_bias = rest if with_bias else (None, *rest)
    return x, bias, residual, weight, (*norm_bias, None)[0]


def two_ops(norm, given, upstreams, with_bias, *, probability=P, training=True):
    """Outputs and gradients by bias_dropout_add and the norm, one after the other."""
    inner = torch.ops.redline
    x, bias, residual, weight, norm_bias = split(given, with_bias)
    torch.manual_seed(11)
    total, state = inner.bias_dropout_add_forward(x, bias, residual, probability, training)
    zeros, (y_grad, total_grad) = torch.zeros_like(x), upstreams
    if norm == "rms_norm":
        y, _, inverse = inner.rms_norm_forward(zeros, total, weight, 1e-5, False, None)
        residual_grad, *parameters = inner.rms_norm_backward(
            y_grad, total, weight, inverse, total_grad, False, None, True
        )
    else:
        y, _, *statistics = inner.layer_norm_forward(
            zeros, total, weight, norm_bias, 1e-5, False, None
        )
        residual_grad, *parameters = inner.layer_norm_backward(
            y_grad, total, weight, norm_bias, *statistics, total_grad, False, None, True, True
        )
    drawn = probability if training else 0.0
    x_grad, bias_grad = inner.bias_dropout_add_backward(
        residual_grad, state, bias, x.dtype, drawn, with_bias
    )
    return [y, total], [x_grad, *[bias_grad][: int(with_bias)], residual_grad, *parameters]


def truth_of(norm, given, keep, rounded, with_bias):
    """y and the sum in float64; the sum is rounded before it is normalised."""
    leaves = wide(*given)
    x, bias, residual, *parameters = split(leaves, with_bias)
    total = reference.bias_dropout_add(x, bias, residual, keep, P)
    if rounded.dtype != torch.float32:
        total = total + (rounded.detach().cpu().double() - total).detach()
    return leaves, (reference_norm(norm, total, *parameters), total)


def reference_norm(norm, total, weight, bias):
    parameters = (weight,) if norm == "rms_norm" else (weight, bias)
    return getattr(reference, norm)(total, *parameters)


@devices
@dtypes
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", SMALL + TILES + HUGE[:1], ids=cases.name)
@norms
def test_forward_and_backward(norm, case, with_bias, dtype, device):
    given = inputs(norm, case, dtype, device, with_bias)
    keep = mask_of(state_of(given[0]), case)
    outs, grads, up = contract.gradients(seeded(fused(norm, with_bias)), given)
    leaves, expected = truth_of(norm, given, keep, outs[1], with_bias)
    sums = 8 + case[1] ** 0.5
    assert_close(outs[0].cpu(), expected[0], sums=sums + 8, what="y")
    x, bias, residual, *_ = split(wide(*given), with_bias)
    total = reference.bias_dropout_add(x, bias, residual, keep, P)
    assert_close(outs[1].cpu(), total, sums=3, what="sum")
    truth = torch.autograd.grad(expected, leaves, [u.cpu().double() for u in up])
    for index, (ours, wanted) in enumerate(zip(grads, truth, strict=True)):
        assert ours.dtype == dtype
        # x_grad is made of the residual's, which is rounded first; the bias's sums x_grad.
        roundings = 2 if index < 1 + with_bias else 1
        assert_close(
            ours.cpu(),
            wanted,
            roundings=roundings,
            sums=4 * sums + case[0],
            what=f"gradient {index}",
        )


@devices
@dtypes
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", [(5, 255), (3, 4097), (2, 20000), *TILES], ids=cases.name)
@norms
def test_bits_of_the_two_ops(norm, case, with_bias, dtype, device):
    given = inputs(norm, case, dtype, device, with_bias)
    for options in ({}, {"probability": 0.0}, {"training": False}):
        outs, grads, up = contract.gradients(seeded(fused(norm, with_bias, **options)), given)
        expected_outs, expected = two_ops(norm, given, up, with_bias, **options)
        contract.equal_bits(outs, expected_outs)
        contract.equal_bits(grads, expected)


@devices
@norms
def test_float32_residual_under_bf16(norm, device):
    x, bias, residual, *parameters = inputs(norm, (70, 300), torch.float32, device)
    given = [x.bfloat16(), bias, residual, *parameters]
    outs, grads, up = contract.gradients(seeded(fused(norm)), given)
    assert [out.dtype for out in outs] == [torch.bfloat16, torch.float32]
    assert [g.dtype for g in grads] == [torch.bfloat16] + [torch.float32] * (len(given) - 1)
    expected_outs, expected = two_ops(norm, given, up, True)
    contract.equal_bits(outs, expected_outs)
    contract.equal_bits(grads, expected)


@devices
def test_float32_x_beside_a_16_bit_weight(device):
    """In norm_linear: y is rounded to the weight's dtype, the gradient of x has x's."""
    x, residual, gain = inputs("rms_norm", (6, 40), torch.float32, device, with_bias=False)
    leaves = (x.requires_grad_(), residual.zero_().requires_grad_())
    weight = randn(24, 40, dtype=torch.bfloat16, device=device)
    y, total = ops.norm_linear(x, gain, None, weight, residual=residual, dropout=0.3)
    x_grad, residual_grad = torch.autograd.grad((y, total), leaves, (torch.ones_like(y), x))
    assert y.dtype == torch.bfloat16 and x_grad.dtype == torch.float32
    kept = torch.where(total != 0, residual_grad, 0.0) / 0.7
    torch.testing.assert_close(x_grad, kept, rtol=1e-6, atol=0.0)


@devices
@norms
def test_of_the_sum_alone_and_of_frozen_inputs(norm, device):
    """A gradient of the sum without one of y, of y without the sum, and of the residual alone."""
    given = inputs(norm, (6, 130), torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in given]
    up = torch.ones_like(given[0])
    y, total = seeded(fused(norm))(*leaves)
    zero = torch.zeros_like(up)
    sum_alone = torch.autograd.grad(total, leaves[:3], up, retain_graph=True)
    y_alone = torch.autograd.grad(y, leaves, up)
    contract.equal_bits(y_alone, two_ops(norm, [t.detach() for t in given], (up, zero), True)[1])
    plain = seeded(lambda *args: ops.bias_dropout_add(*args, P))(*leaves[:3])
    contract.equal_bits(sum_alone, torch.autograd.grad(plain, leaves[:3], up))
    frozen = [tensor.detach() for tensor in given]
    frozen[2].requires_grad_()
    y, total = seeded(fused(norm))(*frozen)
    (residual_grad,) = torch.autograd.grad(y, frozen[2], up)
    assert torch.equal(residual_grad, y_alone[2])


@devices
@norms
def test_everything_dropped_and_missing_parameters(norm, device):
    x, bias, residual, *_ = inputs(norm, (4, 130), torch.float32, device)
    op = getattr(ops, f"bias_dropout_residual_{norm}")
    x[0, 0] = float("inf")
    x.requires_grad_()
    y, total = op(x, bias, residual, 1.0)
    assert torch.equal(total, residual) and torch.equal(y, getattr(ops, norm)(residual))
    assert not torch.autograd.grad(y.sum() + total.sum(), x)[0].any()
    weight = torch.full((130,), 0.25, device=device)
    centered = op(torch.zeros_like(x), bias, residual, 0.0, weight, zero_centered=True)[0]
    assert torch.equal(centered, getattr(ops, norm)(residual + bias, weight, zero_centered=True))


@devices
def test_without_dropout_no_number_is_drawn(device):
    given = inputs("rms_norm", (7, 65), torch.float32, device)
    state = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state() if device == "cuda" else None
    for options in ({"probability": 0.0}, {"training": False}):
        contract.gradients(fused("rms_norm", **options), given)
    assert torch.equal(state, torch.get_rng_state())
    if device == "cuda":
        assert torch.equal(on_cuda, torch.cuda.get_rng_state())


@devices
@dtypes
@norms
def test_bits_do_not_depend_on_strides_or_threads(norm, dtype, device):
    op = seeded(fused(norm))
    for rows in (300, 600):
        contract.same_bits(op, inputs(norm, (rows, 999), dtype, device))
    given = inputs(norm, (40, 999), dtype, device)
    contract.equal_bits(op(*[strided(tensor) for tensor in given]), op(*given))
    _, grads, up = contract.gradients(op, given)
    apart = contract.gradients(op, given, [strided(tensor) for tensor in up])
    contract.equal_bits(apart[1], grads)


@devices
@norms
def test_gradient_has_the_mask_of_forward(norm, device):
    """Also where a checkpoint or a compiled graph computes forward again."""
    x, residual = torch.ones(64, 257, device=device), torch.zeros(64, 257, device=device)
    op = fused(norm, with_bias=False)

    def layer(x, residual):
        y, total = op(x, residual)
        return y * 1.0, total

    def checkpointed(*args):
        return checkpoint(layer, *args, use_reentrant=False)

    functions = [layer, checkpointed]
    for function in (layer, checkpointed):
        torch._dynamo.reset()
        for backend in ("aot_eager", "aot_eager_decomp_partition"):
            functions.append(torch.compile(function, fullgraph=True, backend=backend))
    for function in functions:
        leaf = x.clone().requires_grad_()
        y, total = function(leaf, residual)
        (total.sum() + 0 * y.sum()).backward()
        keep = total != 0
        assert torch.equal(keep, leaf.grad != 0) and 0.6 < keep.double().mean() < 0.8


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    for norm in NORMS:
        shapes = [(3, 5), (5,), (3, 5), (5,), (5,)][: 4 + (norm == "layer_norm")]
        given = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
        assert torch.autograd.gradcheck(seeded(fused(norm)), given)
