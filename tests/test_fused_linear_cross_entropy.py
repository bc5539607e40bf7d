"""fused_linear_cross_entropy against float64, in both of its modes, and what the laws ask."""
# Over budget: parameters: a test has one for each thing that is varied.

import pytest
import torch
import torch.nn.functional as F

import contract
from cases import DEVICES, randn, strided, wide
from head_cases import (
    CHUNKED,
    OPTIONS,
    THREE,
    call,
    draw,
    dtypes,
    leaves_of,
    modes,
    products,
    stock_of,
    truth_of,
)
from redline import ops
from tolerance import assert_close, relative_error

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (tokens, hidden, vocabulary): one of each, odd, a tile's edge, no tokens, no hidden.
CASES = [(1, 1, 1), (3, 5, 7), (9, 33, 255), (130, 24, 129), (1, 16, 4097), (0, 8, 64), (4, 0, 9)]


def compare(case, dtype, device, options, with_bias, promised):
    tensors, targets = draw(case, dtype, device, with_bias)
    upstream = randn(case[0], dtype=torch.float32, device=device, seed=5)
    leaves = leaves_of(tensors)
    scale = upstream if promised else None
    losses = call(leaves, targets, "none", loss_scale=scale, **options)
    assert losses.dtype == torch.float32 and losses.shape == targets.shape
    grads = torch.autograd.grad(losses, leaves, upstream)
    truth, grads64 = truth_of(tensors, targets, upstream, options)
    # The logits are rounded to the dtype, up to four roundings of 1 at their size; then the
    # logits' gradient, and what the products make of it.
    bulk = 1 + truth.abs().max().item() if case[0] else 1
    assert_close(losses.cpu().double() + bulk, truth + bulk, dtype, roundings=4, sums=16)
    theirs = [None] * 3
    if set(options) <= {"label_smoothing"} and case[1]:
        theirs = [grad.cpu() for grad in stock_of(tensors, targets, upstream, **options)[1]]
    for what, grad, grad64, stock in zip(
        ("x", "weight", "bias"), grads, grads64, theirs, strict=False
    ):
        assert grad.dtype == dtype
        if case[2] == 1:  # what is left of terms of the upstream gradient's size
            assert_close(grad.cpu().double() + 4, grad64 + 4, dtype)
        else:
            assert_close(
                grad.cpu(), grad64, dtype, roundings=8, sums=64, stock=stock, what=f"{what}_grad"
            )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@dtypes
@modes
def test_forward_and_backward(promised, dtype, options, case, device):
    for with_bias in (True, False):
        compare(case, dtype, device, options, with_bias, promised)


@dtypes
@modes
def test_chunks(promised, dtype, device):
    compare(CHUNKED[device], dtype, device, OPTIONS["all"], True, promised)


@modes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 3, 12])
def test_reductions_and_ignored_tokens_follow_stock(ignored, reduction, promised, device):
    """Under an upstream gradient that is not the promised one, but for "none"."""
    tensors, targets = draw((12, 6, 77), torch.float32, device)
    targets[:ignored] = -7
    leaves, others = leaves_of(tensors), wide(*tensors)
    up = randn(*([12] if reduction == "none" else []), dtype=torch.float32, device=device)
    scale = None
    if promised:
        scale = up if reduction == "none" else 4.0
    loss = call(leaves, targets, reduction, -7, loss_scale=scale)
    stock = F.cross_entropy(F.linear(*others), targets.cpu(), reduction=reduction, ignore_index=-7)
    assert_close(loss.cpu(), stock.detach(), sums=16)
    ours = torch.autograd.grad(loss, leaves, up)
    theirs = torch.autograd.grad(stock, others, up.cpu().double())
    for grad, grad64 in zip(ours, theirs, strict=True):
        assert_close(grad.cpu(), grad64.nan_to_num(0.0), sums=32)  # stock's 0 / 0 is NaN
    assert not ours[0][:ignored].any()
    if ignored == 12 and reduction == "mean":
        assert loss.isnan() and not any(grad.any() for grad in ours)


@modes
@dtypes
@pytest.mark.parametrize("case", [{}, CHUNKED, THREE], ids=["one", "chunked", "three"])
def test_same_bits(case, dtype, promised, device):
    """For one number of threads: MKL splits rows over those it has."""
    tensors, targets = draw(case.get(device, (70, 33, 1001)), dtype, device)
    results = []
    for _ in range(2):
        leaves = leaves_of(tensors)
        loss = call(leaves, targets, loss_scale=1.0 if promised else None)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    contract.equal_bits(*results)


@modes
def test_follows_cross_entropy_of_linear(promised, device):
    tensors, targets = draw((9, 32, 256), torch.float32, device, with_bias=False)
    leaves, others = leaves_of(tensors), leaves_of(tensors)
    loss = call(leaves, targets, loss_scale=1.0 if promised else None)
    unfused = ops.cross_entropy(ops.linear(*others), targets)
    assert_close(loss.cpu(), unfused.double().cpu(), roundings=4)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(unfused, others), strict=True
    ):
        assert_close(ours.cpu(), theirs.double().cpu(), sums=16)


@modes
@dtypes
def test_strided_and_batched_inputs(dtype, promised, device):
    (x, weight, bias), targets = draw((24, 10, 50), dtype, device)
    scale = 1.0 if promised else None
    leaves = leaves_of((x, weight, bias))
    loss = call(leaves, targets, loss_scale=scale)
    expected = torch.autograd.grad(loss, leaves)
    others = [
        strided(x.view(4, 6, 10).transpose(0, 1)).requires_grad_(),
        weight.t().contiguous().t().requires_grad_(),
        strided(bias).requires_grad_(),
    ]
    turned = call(others, targets.view(4, 6).t(), loss_scale=scale)
    assert_close(turned.cpu(), loss.detach().double().cpu(), dtype, sums=16)
    x_grad, *rest = torch.autograd.grad(turned, others)
    for ours, theirs in zip((x_grad.transpose(0, 1).reshape(24, 10), *rest), expected, strict=True):
        assert_close(ours.cpu(), theirs.double().cpu(), dtype, roundings=2, sums=16)


@modes
def test_one_token_without_an_axis(promised, device):
    (x, weight, _), targets = draw((1, 6, 9), torch.float32, device)
    leaves = leaves_of((x[0], weight))
    loss = call(leaves, targets[0].int(), "none", loss_scale=1.0 if promised else None)
    assert loss.shape == () and torch.autograd.grad(loss, leaves)[0].shape == (6,)


# --- which products run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "recomputed", "promised"),
    [("", (1, 3), 3), ("x", (1, 2), 2), ("weight", (1, 2), 2), ("x weight", (1, 1), 1)],
    ids=["none", "x", "weight", "both"],
)
def test_products_that_no_one_needs_are_left_out(frozen, recomputed, promised, device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    leaves = dict(zip(("x", "weight", "bias"), leaves_of(tensors), strict=True))
    for name in frozen.split():
        leaves[name].requires_grad_(False)
    loss, forward = products(lambda: call(leaves.values(), targets))
    _, backward = products(loss.backward)
    assert (forward, backward) == recomputed
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert {name for name, grad in grads.items() if grad is None} == set(frozen.split())
    for leaf in leaves.values():
        leaf.grad = None
    loss, forward = products(lambda: call(leaves.values(), targets, loss_scale=1.0))
    _, backward = products(loss.backward)
    assert (forward, backward) == (promised, 0)
    for name, leaf in leaves.items():
        if name in frozen.split():
            assert leaf.grad is None
        else:
            assert_close(leaf.grad.cpu(), grads[name].double().cpu(), sums=16)


def test_a_promise_costs_nothing_without_a_gradient(device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    with torch.no_grad():
        assert products(lambda: call(leaves_of(tensors), targets, loss_scale=1.0))[1] == 1
    assert products(lambda: call(tensors, targets, loss_scale=1.0))[1] == 1
    contract.runs_in_inference_mode(lambda x, w: call((x, w), targets, loss_scale=1.0), tensors[:2])


# --- the promise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [8.0, "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", [{}, THREE], ids=["one", "three"])
@dtypes
def test_another_upstream_gradient_rescales(dtype, case, reduction, scale, device):
    """The weight's gradient of three chunks: 1.41 roundings of the sum, one of the ratio, and one
    of what it is compared with."""
    tensors, targets = draw(case.get(device, (9, 32, 256)), dtype, device)
    # So many tokens and classes would leave float16 with subnormal gradients of the logits.
    by = 1 if not case else 4 * (targets.numel() if reduction == "mean" else 1)
    scale = torch.tensor(128.0 * by, device=device) if scale == "tensor" else scale * by
    up = torch.tensor(0.3 * by, device=device)
    grads = []
    for promise in (scale, None):
        leaves = leaves_of(tensors)
        loss = call(leaves, targets, reduction, loss_scale=promise)
        grads.append(torch.autograd.grad(loss, leaves, up))
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours.cpu(), theirs.double().cpu(), dtype, roundings=3, sums=16)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_three_chunks_round_the_weights_gradient_three_times(dtype, reduction, device):
    """Against the float32 sum of the same products: a third, two thirds and the whole are rounded,
    sqrt(1/3 + 2/3 + 1) = 1.41 of one rounding where they are independent; cuBLASLt's kernels round
    the second and third product too: sqrt(1.41^2 + 2/3) = 1.63."""
    tensors, targets = draw(THREE[device], dtype, device, with_bias=False)
    up = 4.0 if reduction == "mean" else 4.0 / targets.numel()
    ours, theirs = leaves_of(tensors), leaves_of(tensors)
    wide = torch.empty_like(tensors[1], dtype=torch.float32)
    for leaves, options in ((ours, {}), (theirs, {"main_grad": wide, "accumulate": False})):
        loss = call(leaves, targets, reduction, loss_scale=up, **options)
        loss.backward(torch.as_tensor(up, device=device))
    contract.equal_bits([ours[0].grad], [theirs[0].grad])
    once = relative_error(wide.to(dtype), wide)
    expected = 1.63 if device == "cuda" else 1.41
    assert 1.2 * once < relative_error(ours[1].grad, wide) < 1.1 * expected * once
    assert_close(ours[1].grad, wide.double(), dtype, roundings=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_scales_of_a_token_each_are_summed_in_float32(dtype, device):
    """Of two signs, so that chunks may cancel, and their roundings would not."""
    tensors, targets = draw(THREE[device], dtype, device, with_bias=False)
    up = torch.ones(targets.shape, device=device)
    up[1::2] = -1.0
    ours, theirs = leaves_of(tensors), leaves_of(tensors)
    wide = torch.empty_like(tensors[1], dtype=torch.float32)
    for leaves, options in ((ours, {}), (theirs, {"main_grad": wide, "accumulate": False})):
        call(leaves, targets, "none", loss_scale=up, **options).backward(up)
    assert torch.equal(ours[1].grad, wide.to(dtype))


def test_an_exported_promise_takes_any_number_of_tokens(device):
    (x, weight), targets = draw((64, 8, 9001), torch.bfloat16, device, with_bias=False)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, x, targets):
            return call((x, self.weight), targets, "mean", loss_scale=1.0)

    tokens = torch.export.Dim("tokens", min=2, max=100000)
    program = torch.export.export(Head(), (x, targets), dynamic_shapes=({0: tokens}, {0: tokens}))
    longer, wanted = draw((3000, 8, 9001), torch.bfloat16, device, with_bias=False)
    expected = call((longer[0], weight), wanted, "mean")
    assert_close(program.module()(longer[0], wanted).cpu(), expected.double().cpu(), roundings=1)


@dtypes
@pytest.mark.parametrize("up", [1.0, 0.3])
def test_what_was_kept_is_given_away(up, dtype, device):
    """Unless the graph is kept for another backward, or the dtype differs: the bias's."""
    tensors, targets = draw((9, 32, 256), dtype, device)
    leaves, kept, up = leaves_of(tensors), [], torch.tensor(up, device=device)

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call(leaves, targets, loss_scale=1.0)
    first = torch.autograd.grad(loss, leaves, up, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, up, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, up)
    contract.equal_bits(first, again)
    contract.equal_bits(first, last)
    assert not {grad.data_ptr() for grad in first} & set(kept)
    given = last if dtype == torch.float32 else last[:2]
    assert {grad.data_ptr() for grad in last} & set(kept) == {grad.data_ptr() for grad in given}


def test_another_upstream_gradient_of_none_is_refused(device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    up = torch.ones(9, device=device)
    leaves = leaves_of(tensors)
    main_grad = torch.zeros_like(tensors[1])
    loss = call(leaves, targets, "none", loss_scale=up, main_grad=main_grad)
    up = torch.arange(9, device=device).clamp(max=1) + 0.0
    if device == "cpu":
        with pytest.raises(RuntimeError, match="loss_scale: expected the upstream gradient that w"):
            loss.backward(up)
        assert not main_grad.any()
    else:
        loss.backward(up)
        assert leaves[0].grad.isnan().all() and leaves[2].grad.isnan().all()
        assert main_grad.isnan().all()


def test_a_promised_backward_with_create_graph_is_refused(device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    leaves = leaves_of(tensors)
    loss = call(leaves, targets, loss_scale=1.0)
    with pytest.raises(RuntimeError, match="loss_scale: expected a backward without create_graph"):
        torch.autograd.grad(loss, leaves, create_graph=True)


# --- main_grad ------------------------------------------------------------------------------------


@modes
@dtypes
@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["adds", "overwrites"])
@pytest.mark.parametrize("chunked", [False, True], ids=["one", "chunked"])
def test_main_grad(chunked, accumulate, buffer_dtype, dtype, promised, device):
    case = CHUNKED[device] if chunked else (9, 33, 255)
    tensors, targets = draw(case, dtype, device)
    leaves = leaves_of(tensors)
    before = randn(*tensors[1].shape, dtype=buffer_dtype, device=device, seed=9, scale=1e-3)
    main_grad = before.clone() if accumulate else torch.full_like(before, float("nan"))
    untouched, version = main_grad.clone(), main_grad._version
    scale = 2.0 if promised else None
    loss = call(leaves, targets, loss_scale=scale, main_grad=main_grad, accumulate=accumulate)
    contract.equal_bits([main_grad], [untouched])  # forward leaves it alone
    loss.backward(torch.tensor(2.0, device=device))
    assert main_grad._version > version
    assert leaves[1].grad is None and leaves[0].grad is not None and leaves[2].grad is not None
    upstream = torch.full((case[0],), 2.0 / case[0], device=device)
    _, (_, truth, _) = truth_of(tensors, targets, upstream, {})
    truth = truth + before.cpu().double() if accumulate else truth
    _, (_, stock, _) = stock_of(tensors, targets, upstream)
    stock = stock.cpu() + before.cpu() if accumulate else stock.cpu()
    assert_close(main_grad.cpu(), truth, buffer_dtype, roundings=8, sums=64, stock=stock)


@modes
@pytest.mark.parametrize("dummy", ["none", "empty", "zeros"])
def test_main_grad_gives_autograd_a_dummy(dummy, promised, device):
    tensors, targets = draw((9, 32, 256), torch.bfloat16, device)
    leaves = leaves_of(tensors)
    main_grad = torch.zeros(256, 32, device=device)
    scale = 1.0 if promised else None
    call(leaves, targets, loss_scale=scale, main_grad=main_grad, dummy_grad=dummy).backward()
    assert main_grad.abs().sum() > 0
    if dummy == "none":
        assert leaves[1].grad is None
        return
    assert leaves[1].grad.shape == leaves[1].shape and leaves[1].grad.dtype == torch.bfloat16
    assert dummy == "empty" or not leaves[1].grad.any()
