"""cross_entropy with `loss_scale`: the gradient made in forward, against float64 and two passes."""
# Over budget: parameters: a test has one for each thing that is varied.

import math

import pytest
import torch
import torch.nn.functional as F

import cases
import contract
from cases import DEVICES, DTYPES, strided
from loss_cases import OPTIONS, call, draw, extreme, truth_of, upstream_of
from redline import ops
from redline.dyno.measure import saved_bytes
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

# (rows, vocabulary): one class, less than a vector, odd, no rows; on CUDA rows of a warp, a block
# and clusters of 2, 4 and 8, the last block's part short, and rows beyond a cluster.
SIZES = [(1, 1), (3, 7), (9, 1000), (0, 64), (300, 8), (5, 4096)]
SIZES += [(4, 32000), (3, 50257), (3, 50304), (2, 128256)]
SIZES_CUDA = [(2, 151936), (3, 262144), (2, 320000)]
LONGEST = 8 * 76032  # bytes of a row that CUDA reads once
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def compare(case, dtype, device, reduction, options):
    logits, targets = draw(case, dtype, device, ignored=case[0] // 3)
    up = upstream_of(reduction, case[0], device)
    loss, grad = call(logits, targets, reduction, up=up, promise=up, **options)
    truth, gradient = truth_of(logits, targets, reduction, up, options)
    assert loss.dtype == torch.float32 and loss.shape == truth.shape and grad.dtype == dtype
    # A loss is the difference of two numbers of the size of the largest logit, and a sum adds rows.
    scale = logits.double().abs().max().item() + 1 if case[0] else 1
    scale *= case[0] if reduction == "sum" else 1
    assert_close(loss.cpu().double() + scale, truth + scale, torch.float32, roundings=8)
    if case[1] == 1:  # the gradient is what is left of terms of the upstream gradient's size
        terms = up.abs().max().cpu().double()
        assert_close(grad.cpu().double() + terms, gradient + terms, dtype, sums=4)
    else:
        assert_close(grad.cpu(), gradient, dtype, sums=16)
    assert not grad[: case[0] // 3].any()


@pytest.mark.parametrize("case", SIZES, ids=cases.name)
@dtypes
@options_of
@reductions
def test_forward_and_backward(reduction, options, dtype, case, device):
    compare(case, dtype, device, reduction, options)


@pytest.mark.parametrize("case", SIZES_CUDA, ids=cases.name)
@dtypes
@options_of
def test_rows_of_a_cluster(options, dtype, case, device):
    if device == "cpu":
        pytest.skip("clusters are CUDA's")
    compare(case, dtype, device, "mean", options)


@pytest.mark.parametrize("case", [*SIZES, (3, 262144), (2, 320000)], ids=cases.name)
@dtypes
@options_of
def test_agrees_with_two_passes(options, dtype, case, device):
    """On the CPU by the same arithmetic; on CUDA the sum is added in another order, unless no
    cluster holds a row."""
    if device == "cpu" and case[1] > 60000:
        pytest.skip("nothing of the CPU's depends on the width of a row")
    logits, targets = draw(case, dtype, device, ignored=case[0] // 3)
    up = torch.tensor(0.7, device=device)
    ours = call(logits, targets, up=up, promise=0.7, **options)
    theirs = call(logits, targets, up=up, promise=None, **options)
    if device == "cpu" or case[1] * dtype.itemsize > LONGEST:
        contract.equal_bits(ours, theirs)
        return
    assert_close(ours[0], theirs[0].double(), roundings=8)
    assert_close(ours[1], theirs[1].double(), dtype, roundings=2, sums=16)


@dtypes
@pytest.mark.parametrize("cols", [1568, 4097, 50257, 50304])
def test_bits_do_not_depend_on_strides_threads_or_neighbours(cols, dtype, device):
    logits, targets = draw((12, cols), dtype, device)
    contract.same_bits(lambda x: ops.cross_entropy(x, targets, loss_scale=2.0), [logits])
    up = upstream_of("none", 12, device)
    expected = call(logits, targets, "none", up=up, promise=up, z_loss=0.1)
    for _ in range(20 if device == "cuda" else 1):
        again = call(logits, targets, "none", up=up, promise=up, z_loss=0.1)
        contract.equal_bits(again, expected)
    for row in range(12):
        one = slice(row, row + 1)
        alone = call(logits[one], targets[one], "none", up=up[one], promise=up[one], z_loss=0.1)
        contract.equal_bits(alone, [result[one] for result in expected])
    aligned = torch.zeros(12, cols + 64, dtype=dtype, device=device)[:, :cols]
    aligned.copy_(logits)
    for apart in (strided(logits), aligned):
        again = call(apart, targets, "none", up=up, promise=up, z_loss=0.1)
        contract.equal_bits(again, expected)


@dtypes
@pytest.mark.parametrize("cols", [2504, 101024])
def test_extreme_and_masked_logits_follow_two_passes(cols, dtype, device):
    """On CUDA a whole block of the cluster may be masked."""
    logits, targets = extreme(cols, cols - 50, dtype, device)
    up = upstream_of("none", 9, device)
    loss, grad = call(logits, targets, "none", up=up, promise=up)
    stock = logits.double().requires_grad_()
    truth = F.cross_entropy(stock, targets, reduction="none")
    gradient = torch.autograd.grad(truth, stock, up.double())[0]
    for row in range(9):
        assert_close(loss[row].cpu(), truth[row].cpu(), roundings=1024, what=f"loss {row}")
        assert_close(grad[row].cpu(), gradient[row].cpu(), sums=16, what=f"gradient {row}")


def test_all_rows_ignored(device):
    logits, targets = draw((4, 64), torch.float32, device, ignored=4)
    loss, grad = call(logits, targets, up=torch.tensor(1.0, device=device), promise=1.0)
    assert loss.isnan() and not grad.any()


def test_upstream_gradients_of_any_value(device):
    logits, targets = draw((5, 40), torch.float32, device)
    targets[4] = -100
    up = torch.tensor([0.0, math.inf, -0.0, -2.5, 1.0], device=device)
    ours = call(logits, targets, "none", up=up, promise=up)
    assert not ours[1][[0, 2, 4]].any()
    contract.equal_bits([ours[1][1].isfinite()], [torch.zeros(40, dtype=bool, device=device)])
    zero = torch.tensor(0.0, device=device)
    assert not call(logits, targets, up=zero, promise=0.0)[1].any()
    assert not call(logits, targets, up=zero, promise=3.0)[1].any()


# --- the promise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [8.0, "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cols", [256, 1001])
@dtypes
def test_another_upstream_gradient_rescales(dtype, cols, reduction, scale, device):
    logits, targets = draw((9, cols), dtype, device, ignored=2)
    scale = torch.tensor(1024.0, device=device) if scale == "tensor" else scale
    up = torch.tensor(0.3, device=device)
    _, grad = call(logits, targets, reduction, up=up, promise=scale)
    _, truth = truth_of(logits, targets, reduction, up, {})
    assert_close(grad.cpu(), truth.cpu(), dtype, roundings=3, sums=16)


@pytest.mark.parametrize("rows", [9, 1025, 65536, 65537])
def test_a_mean_divides_by_the_rows_that_count(rows, device):
    logits, targets = draw((rows, 8), torch.float32, device, ignored=rows // 3)
    count = torch.tensor(float(rows - rows // 3), device=device)
    up = torch.ones((), device=device)
    expected = call(logits, targets, "sum", up=up / count, promise=up / count)[1]
    contract.equal_bits([call(logits, targets, up=up, promise=up)[1]], [expected])


def test_another_upstream_gradient_of_none_is_refused(device):
    logits, targets = draw((9, 256), torch.float32, device)
    promise = torch.ones(9, device=device)
    up = promise.clone()
    up[4] = 1 + 2.0**-23
    if device == "cpu":
        with pytest.raises(
            RuntimeError,
            match="cross_entropy: loss_scale: expected the upstream gradient that was promised for "
            "every target, not another; without loss_scale any is right",
        ):
            call(logits, targets, "none", up=up, promise=promise)
    else:
        assert call(logits, targets, "none", up=up, promise=promise)[1].isnan().all()
    expected = call(logits, targets, "none", up=promise, promise=promise)
    contract.equal_bits(call(logits, targets, "none", up=promise, promise=1.0), expected)


@dtypes
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "broken"])
def test_a_graph_that_is_kept_gives_the_gradient_again(kept, dtype, device):
    logits, targets = draw((9, 256), dtype, device)
    up = torch.tensor(1.0 if kept else 3.0, device=device)
    expected = call(logits, targets, up=up, promise=1.0)[1]
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, targets, loss_scale=1.0)
    first = torch.autograd.grad(loss, leaf, up, retain_graph=True)[0]
    contract.equal_bits([first], [expected])
    first.zero_()
    contract.equal_bits(torch.autograd.grad(loss, leaf, up), [expected])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf, up)


def test_what_is_kept_and_given(device):
    """The gradient alone, and its own memory where the promise was kept."""
    logits, targets = draw((9, 256), torch.bfloat16, device)
    leaf = logits.requires_grad_()
    scale = torch.ones((), device=device)
    kept = saved_bytes(lambda: ops.cross_entropy(leaf, targets, loss_scale=scale), [scale])
    assert kept == logits.nbytes
    places = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: places.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        loss = ops.cross_entropy(leaf, targets, loss_scale=scale)
    assert torch.autograd.grad(loss, leaf)[0].data_ptr() == places[0]


def test_a_promise_costs_nothing_without_a_gradient(device):
    logits, targets = draw((9, 256), torch.float32, device)
    plain, promised = [], []
    with contract.seen_calls(plain):
        expected = ops.cross_entropy(logits, targets)
    scale = torch.ones((), device=device)
    with contract.seen_calls(promised):
        loss = ops.cross_entropy(logits, targets, loss_scale=scale)
    assert promised == plain and torch.equal(loss, expected)
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        loss = ops.cross_entropy(leaf * 1, targets, loss_scale=1.0, inplace_backward=True)
    assert torch.equal(loss, expected) and not loss.requires_grad


@dtypes
@pytest.mark.parametrize("cols", [64, 1023, 32000])
def test_inplace(cols, dtype, device):
    """Forward writes the gradient over the logits."""
    leaf, targets = draw((6, cols), dtype, device, ignored=1)
    up = torch.tensor(1.5, device=device)
    expected = call(leaf, targets, up=up, promise=1.5)
    leaf = leaf.requires_grad_()
    logits = leaf * 1
    other = logits.square().sum()  # keeps the logits too
    loss = ops.cross_entropy(logits, targets, loss_scale=1.5, inplace_backward=True)
    contract.equal_bits([loss, logits], expected)
    contract.equal_bits(torch.autograd.grad(loss, leaf, up), expected[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, leaf)
    gap = strided(leaf.detach()).requires_grad_()
    for turned in (gap * 1, (gap * 1).unsqueeze(1).expand(6, 3, cols)[:, 1]):
        loss = ops.cross_entropy(turned, targets, loss_scale=1.5, inplace_backward=True)
        contract.equal_bits(torch.autograd.grad(loss, gap, up), expected[1:])


def test_inplace_rescales_and_is_guarded(device):
    logits, targets = draw((4, 24), torch.float32, device)
    leaf = logits.requires_grad_()
    with pytest.raises(RuntimeError, match="inplace_backward: expected logits that an op computed"):
        ops.cross_entropy(leaf, targets, loss_scale=1.0, inplace_backward=True)
    computed = leaf * 1
    loss = ops.cross_entropy(computed, targets, loss_scale=4.0, inplace_backward=True)
    up = torch.tensor(0.3, device=device)
    ours = torch.autograd.grad(loss, leaf, up)[0]
    assert_close(ours.cpu(), truth_of(logits, targets, "mean", up, {})[1], roundings=3, sums=16)
    computed = leaf * 1
    loss = ops.cross_entropy(computed, targets, loss_scale=1.0, inplace_backward=True)
    computed.detach().zero_()  # what was kept is gone
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
