"""bias_dropout_add: float64, the mask's statistics, and one mask for forward and backward."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import cases
import contract
import reference
from cases import DEVICES, DTYPES, MODEL, SMALL, randn, strided, wide
from contract import seeded
from redline import ops
from tolerance import assert_close

P = 0.3


def inputs(case, dtype, device):
    return [
        randn(*case, dtype=dtype, device=device),
        randn(case[-1], dtype=dtype, device=device, seed=5),
        randn(*case, dtype=dtype, device=device, seed=6),
    ]


def op(x, bias, residual):
    return ops.bias_dropout_add(x, bias, residual, P)


def mask_of(seed_and_offset, shape):
    """True where an element stays, from the definition of Philox."""
    count = torch.Size(shape).numel()
    return reference.dropout_mask(*seed_and_offset, count, P).view(shape)


def state_of(x):
    """What the next call will have drawn, from the same seed of torch's generators."""
    torch.manual_seed(11)
    return torch.ops.redline.bias_dropout_add_forward(x, None, x, P, True)[1].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SMALL + MODEL[:1], ids=cases.name)
def test_forward_and_backward(case, dtype, device):
    given = inputs(case, dtype, device)
    keep = mask_of(state_of(given[0]), case)
    for with_bias in (False, True):
        function = op if with_bias else lambda x, residual: op(x, None, residual)
        some = given if with_bias else given[::2]
        outs, grads, up = contract.gradients(seeded(function), some)
        leaves = wide(*some)
        x, bias, residual = leaves if with_bias else (leaves[0], None, leaves[1])
        expected = reference.bias_dropout_add(x, bias, residual, keep, P)
        truth = torch.autograd.grad(expected, leaves, up[0].cpu().double())
        for ours, wanted in zip(grads, truth, strict=True):
            assert ours.dtype == dtype
            assert_close(ours.cpu(), wanted, sums=2 + 2 * case[0] ** 0.5)
        assert torch.equal(grads[-1], up[0])
        stock = reference.bias_dropout_add(
            *(None if tensor is None else tensor.detach().to(dtype) for tensor in (x, bias)),
            residual.detach().to(dtype),
            keep,
            P,
        )
        assert_close(outs[0].cpu(), expected, sums=2, stock=stock)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_residual_under_bf16(device):
    x = randn(6, 300, dtype=torch.bfloat16, device=device)
    bias, residual = (randn(*s, dtype=torch.float32, device=device) for s in ((300,), (6, 300)))
    keep = mask_of(state_of(x), x.shape)
    outs, grads, up = contract.gradients(seeded(op), [x, bias, residual])
    dtypes = [tensor.dtype for tensor in (*outs, *grads)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    leaves = wide(x, bias, residual)
    expected = reference.bias_dropout_add(*leaves, keep, P)
    assert_close(outs[0].cpu(), expected, sums=2)
    truth = torch.autograd.grad(expected, leaves, up[0].cpu().double())
    for ours, wanted in zip(grads, truth, strict=True):
        assert_close(ours.cpu(), wanted, sums=8)


@pytest.mark.parametrize("device", DEVICES)
def test_without_dropout_no_number_is_drawn(device):
    given = inputs((7, 65), torch.float32, device)
    before = (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if device == "cuda" else None,
    )
    for probability, training in ((0.0, True), (0.5, False)):
        function = functools.partial(
            ops.bias_dropout_add, probability=probability, training=training
        )
        outs, grads, up = contract.gradients(function, given)
        x, _, residual = given
        assert_close(outs[0].cpu(), sum(wide(*given)).detach(), sums=2)
        assert torch.equal(grads[0], up[0]) and torch.equal(grads[2], up[0])
        assert_close(grads[1].cpu(), up[0].cpu().double().sum(0), sums=8)
        assert_close(function(x, None, residual).cpu(), (x + residual).cpu().double())
    assert torch.equal(before[0], torch.get_rng_state())
    if device == "cuda":
        assert torch.equal(before[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("device", DEVICES)
def test_keep_rate_and_scale(device):
    x = torch.ones(1024, 1024, device=device)
    zeros = torch.zeros_like(x)
    for probability in (0.1, 0.5, 0.9):
        y = ops.bias_dropout_add(x, None, zeros, probability)
        assert torch.equal(y.unique().cpu(), torch.tensor([0.0, 1 / (1 - probability)]))
        kept = (y != 0).double()
        deviation = (probability * (1 - probability)) ** 0.5
        assert (kept.mean() - (1 - probability)).abs() < 5 * deviation / 1024
        for axis in (0, 1):  # rows and columns are no more alike than chance makes them
            spread = kept.mean(axis).std().item() * 1024**0.5 / deviation
            assert 0.85 < spread < 1.15
        other = ops.bias_dropout_add(x, None, zeros, probability) != 0
        both = (kept.bool() & other).double().mean()
        assert (both - (1 - probability) ** 2).abs() < 0.01
    assert not ops.bias_dropout_add(x * float("inf"), None, zeros, 1.0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_decide_the_mask(device):
    given = inputs((33, 65), torch.float32, device)
    first, second = seeded(op)(*given), op(*given)
    assert torch.equal(seeded(op)(*given), first) and not torch.equal(first, second)


def test_devices_share_the_mask():
    """The mask of a state is the definition's on the CPU; for CUDA test_forward says it."""
    y_grad = torch.ones(5, 255)
    state = torch.tensor([-(2**62) + 12345, 4 * (2**33 + 7)])
    x_grad, _ = torch.ops.redline.bias_dropout_add_backward(
        y_grad, state, None, torch.float32, P, False
    )
    assert torch.equal(x_grad != 0, mask_of(state.tolist(), y_grad.shape))
    # Known answers of the paper's authors (Random123, kat_vectors): key and counter all zeros.
    assert reference.philox(0, 0, 1)[0].tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


def masks(function, x, bias, residual):
    """The masks of forward and of the gradient, from data without zeros."""
    x = torch.ones_like(x).requires_grad_()
    residual = torch.zeros_like(residual)
    y = function(x, bias * 0, residual)
    y.sum().backward()
    return y != 0, x.grad != 0


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_has_the_mask_of_forward(device):
    given = inputs((64, 257), torch.float32, device)

    def layer(*args):
        return op(*args) * 1.0

    def checkpointed(*args):
        return checkpoint(layer, *args, use_reentrant=False)

    functions = [op, checkpointed]
    for function in (op, checkpointed):
        torch._dynamo.reset()
        functions.append(torch.compile(function, fullgraph=True, backend="aot_eager"))
        functions.append(
            torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition")
        )
    for function in functions:
        forward, gradient = masks(function, *given)
        assert torch.equal(forward, gradient) and 0.6 < forward.double().mean() < 0.8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_strides_or_threads(dtype, device):
    contract.same_bits(seeded(op), inputs((300, 999), dtype, device))
    given = inputs((40, 999), dtype, device)
    x, bias, residual = given
    y = seeded(op)(*given)
    assert torch.equal(seeded(op)(strided(x), strided(bias), strided(residual)), y)
    plain = seeded(op)(x, None, residual)
    assert torch.equal(seeded(op)(strided(x), None, residual), plain)


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    given = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (5,), (3, 5))
    ]
    assert torch.autograd.gradcheck(seeded(op), given)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, residual = (torch.randn(4, 3, 8, device=device, requires_grad=True) for _ in range(2))
    bias = torch.randn(8, device=device, requires_grad=True)
    registered = torch.ops.redline
    for name in ("bias_dropout_add", "bias_dropout_add_forward"):
        assert torch.Tag.nondeterministic_seeded in getattr(registered, name).default.tags
    contract.passes_opcheck(registered.bias_dropout_add, (x, bias, residual, P, False))
    contract.passes_opcheck(registered.bias_dropout_add, (x, bias, residual, 1.0, True))
    x, bias, residual = x.detach(), bias.detach(), residual.detach()
    contract.passes_opcheck(
        registered.bias_dropout_add_forward, (x, bias, residual, 1.0, True), inner=True
    )
    state = torch.tensor([1, 4], device=device)
    contract.passes_opcheck(
        registered.bias_dropout_add_backward,
        (x, state, bias, torch.float32, P, True),
        inner=True,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_tracing(device):
    given = inputs((6, 3, 40), torch.float32, device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, eager in zip(
        contract.gradients(seeded(compiled), given)[1],
        contract.gradients(seeded(op), given)[1],
        strict=True,
    ):
        assert torch.equal(ours, eager)

    def still(*args):
        return ops.bias_dropout_add(*args, P, False)

    contract.compiles(still, given)
    contract.compiles_dynamic(still, given)
    contract.exports(still, given)
    contract.runs_in_inference_mode(seeded(op), given)
    contract.refuses_vmap(still, given)
    contract.refuses_double_backward(lambda *args: op(*args).square(), given)
    if device == "cuda":
        contract.agrees_on_side_stream(seeded(op), given)
        draws_anew_in_a_graph(*given)
    with torch.autocast(device, dtype=torch.bfloat16):
        x = given[0].bfloat16()
        assert still(x, None, x).dtype == (x + F.dropout(x, P, False)).dtype


def draws_anew_in_a_graph(x, bias, residual):
    """Each replay of a CUDA graph has a mask of its own, and its gradient the same one."""
    x = torch.ones_like(x).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(x, None, residual * 0).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, None, residual * 0)
        y.sum().backward()
    seen = []
    for _ in range(2):
        x.grad.zero_()
        graph.replay()
        assert torch.equal(y != 0, x.grad != 0)
        seen.append((y != 0).clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x, bias = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    for arguments, message in [
        ((x, bias[:7], x, P), r"bias: expected \[8\], not \[7\] float32"),
        ((x, bias.double(), x, P), "bias: expected float32, not float64"),
        ((x, bias, x[:, :7], P), r"residual: expected \[4, 8\], not \[4, 7\]"),
        ((x, bias, x.bfloat16(), P), "residual: expected float32, not bfloat16"),
        ((x.long(), bias, x, P), "x: expected a floating dtype, not Long"),
        ((x, bias, x, 1.5), "probability: expected 0 to 1, not 1.5"),
        ((x, bias, x, -0.5), "probability: expected 0 to 1, not -0.5"),
        (
            (x[0, 0], None, x[0, 0], P),
            "x: expected at least one dimension, not a scalar",
        ),
    ]:
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match=f"bias_dropout_add: {message}"):
            ops.bias_dropout_add(*arguments)
        assert torch.equal(state, torch.get_rng_state())
    backward, state = torch.ops.redline.bias_dropout_add_backward, torch.zeros(0, device=device)
    with pytest.raises(RuntimeError, match="needs_bias: expected bias to be given, or false"):
        backward(x, state.long(), None, torch.float32, P, True)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="residual: expected a tensor on cuda:0, not on cpu"):
            ops.bias_dropout_add(x, bias, x.cpu(), P)
        with pytest.raises(RuntimeError, match="bias_dropout_add: no kernel for float64"):
            ops.bias_dropout_add(x.double(), None, x.double(), P)
