"""cross_entropy against float64: losses, gradients, what is ignored, what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

import cases
import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from loss_cases import OPTIONS, draw, extreme, gradcheck
from redline import ops
from tolerance import assert_close

# (rows, cols): one class, a vector's edge, a tile's edge, odd rows (every alignment), large.
SIZES = [(1, 1), (3, 7), (2, 33), (9, 255), (4, 1024), (9, 4097), (0, 64), (300, 8), (9, 50257)]


def truth_of(logits, targets, upstream, options):
    """Losses and gradient in float64."""
    (leaf,) = wide(logits)
    losses = reference.cross_entropy(leaf, targets.cpu(), **options)
    return losses.detach(), torch.autograd.grad(losses, leaf, upstream.cpu().double())[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SIZES, ids=cases.name)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward(options, case, dtype, device):
    logits, targets = draw(case, dtype, device)
    upstream = randn(case[0], dtype=torch.float32, device=device, seed=5)
    losses, grads, _ = contract.gradients(
        lambda x: ops.cross_entropy(x, targets, "none", **options), [logits], [upstream]
    )
    assert losses[0].dtype == torch.float32 and losses[0].shape == targets.shape
    truth, gradient = truth_of(logits, targets, upstream, options)
    # A loss is the difference of two numbers of the size of the largest logit.
    scale = logits.double().abs().max().item() + 1 if case[0] else 1
    assert_close(losses[0].cpu().double() + scale, truth + scale, torch.float32, roundings=4)
    if case[1] == 1:  # the gradient is what is left of terms of the upstream gradient's size
        terms = upstream[:, None].cpu().double()
        assert_close(grads[0].cpu().double() + terms, gradient + terms, dtype, sums=4)
        return
    theirs = None
    if options.keys() <= {"label_smoothing"}:
        leaf = logits.detach().requires_grad_()
        stock = F.cross_entropy(leaf.float(), targets, reduction="none", **options)
        theirs = torch.autograd.grad(stock, leaf, upstream)[0].cpu()
    assert_close(grads[0].cpu(), gradient, dtype, sums=16, stock=theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 3, 12])
def test_reductions_and_ignored_rows_follow_stock(ignored, reduction, device):
    logits, targets = draw((12, 77), torch.float32, device)
    targets[:ignored] = -7
    ours, grads, upstreams = contract.gradients(
        lambda x: ops.cross_entropy(x, targets, reduction, -7), [logits]
    )
    stock, theirs, _ = contract.gradients(
        lambda x: F.cross_entropy(x, targets, reduction=reduction, ignore_index=-7),
        [logits.double()],
        [upstreams[0].double()],
    )
    assert_close(ours[0], stock[0], roundings=8)
    assert_close(grads[0], theirs[0], sums=16)
    assert not grads[0][:ignored].any()
    if ignored == 12 and reduction == "mean":
        assert ours[0].isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2049])
def test_a_reduction_is_of_all_rows(rows, device):
    """About the 1024 rows of a chunk."""
    logits, targets = draw((rows, 24), torch.float32, device, ignored=rows // 3)
    total = ops.cross_entropy(logits, targets, "none").double().sum()
    assert_close(ops.cross_entropy(logits, targets, "sum"), total, sums=16)
    assert_close(ops.cross_entropy(logits, targets), total / (rows - rows // 3), sums=16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_log_sum_exp_and_its_gradient(dtype, device):
    logits, targets = draw((6, 333), dtype, device)
    targets[1] = -100  # its log_sum_exp is still a value with a gradient
    outs, grads, ups = contract.gradients(
        lambda x: ops.cross_entropy(x, targets, "sum", return_log_sum_exp=True), [logits]
    )
    (leaf,) = wide(logits)
    lse = torch.logsumexp(leaf, -1)
    loss = F.cross_entropy(leaf, targets.cpu(), reduction="sum")
    truth = torch.autograd.grad((loss, lse), leaf, [up.cpu().double() for up in ups])[0]
    assert_close(outs[1].cpu(), lse.detach(), roundings=2)
    assert_close(grads[0].cpu(), truth, sums=16)
    only = torch.autograd.grad(
        ops.cross_entropy(
            leaf32 := logits.clone().requires_grad_(), targets, return_log_sum_exp=True
        )[1].sum(),
        leaf32,
    )[0]
    assert_close(only.cpu(), torch.softmax(leaf.detach(), -1), sums=16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cols", [100352 // 64 + 1, 4097])
def test_bits_do_not_depend_on_strides_threads_or_neighbours(cols, dtype, device):
    logits, targets = draw((40, cols), dtype, device)
    contract.same_bits(lambda x: ops.cross_entropy(x, targets), [logits])
    contract.same_bits(lambda x: ops.cross_entropy(x, targets, "none", z_loss=0.1), [logits])
    loss = ops.cross_entropy(logits, targets, "none")
    leaf = strided(logits).requires_grad_()
    assert torch.equal(ops.cross_entropy(leaf, targets, "none"), loss)
    other = logits.clone().requires_grad_()
    up = torch.randn(40, device=device)
    ours = torch.autograd.grad(ops.cross_entropy(leaf, targets, "none"), leaf, up)[0]
    assert torch.equal(
        ours, torch.autograd.grad(ops.cross_entropy(other, targets, "none"), other, up)[0]
    )
    for row in range(40):
        assert torch.equal(ops.cross_entropy(logits[row], targets[row], "none"), loss[row])
        one = slice(row, row + 1)
        alone = logits[one].clone().requires_grad_()
        row_loss = ops.cross_entropy(alone, targets[one], "none")
        assert torch.equal(row_loss, loss[one])
        assert torch.equal(torch.autograd.grad(row_loss, alone, up[one])[0], ours[one])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_extreme_and_masked_logits_follow_stock(dtype, device):
    logits, targets = extreme(2500, 2400, dtype, device)  # whole blocks before the first finite one
    ours, grads, up = contract.gradients(lambda x: ops.cross_entropy(x, targets, "none"), [logits])
    stock, theirs, _ = contract.gradients(
        lambda x: F.cross_entropy(x, targets, reduction="none"), [logits.double()], [up[0].double()]
    )
    for row in range(9):
        assert_close(ours[0][row].cpu(), stock[0][row].cpu(), roundings=1024, what=f"loss {row}")
        assert_close(grads[0][row].cpu(), theirs[0][row].cpu(), sums=16, what=f"gradient {row}")
    masked = ops.cross_entropy(logits[1], torch.tensor(50, device=device))
    assert masked == math.inf


@pytest.mark.parametrize("device", DEVICES)
def test_upstream_gradients_of_any_value(device):
    """Zero, infinite, NaN and expanded ones, under reduction none."""
    logits, targets = draw((5, 40), torch.float32, device)
    targets[4] = -100
    up = torch.tensor([0.0, math.inf, math.nan, -2.5, math.nan], device=device)
    leaf = logits.requires_grad_()
    grad = torch.autograd.grad(ops.cross_entropy(leaf, targets, "none"), leaf, up)[0]
    assert not grad[0].any() and not grad[4].any() and grad[2].isnan().all()
    rows = torch.autograd.grad(ops.cross_entropy(leaf, targets, "none")[3], leaf)[0]
    assert_close(grad[3], -2.5 * rows[3].double(), roundings=4)
    summed = torch.autograd.grad(ops.cross_entropy(leaf, targets, "none").sum(), leaf)[0]
    assert torch.equal(
        summed, torch.autograd.grad(ops.cross_entropy(leaf, targets, "sum"), leaf)[0]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_targets_out_of_range(device):
    logits, targets = draw((6, 33), torch.float32, device)
    targets[2], targets[4] = 33, -1
    if device == "cpu":
        with pytest.raises(
            RuntimeError,
            match=r"targets: expected classes of \[0, 33\) or ignore_index -100, not 33",
        ):
            ops.cross_entropy(logits, targets)
        return
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, targets, "none")
    grad = torch.autograd.grad(loss.sum(), leaf)[0]
    bad = torch.tensor([False, False, True, False, True, False], device=device)
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan().all(-1), bad)
    assert not grad[~bad].isnan().any() and ops.cross_entropy(leaf, targets).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_a_vocabulary_in_slices_has_the_gradient_of_the_whole(device):
    """Law 10: statistics of two slices merge, and each slice's gradient comes from the merged."""
    logits, targets = draw((7, 500), torch.float32, device)
    registered, cut = torch.ops.redline, 201
    parts = [logits[:, :cut], logits[:, cut:]]
    stats = [
        registered.cross_entropy_statistics(part, targets, start)
        for part, start in zip(parts, (0, cut), strict=True)
    ]
    top = torch.maximum(stats[0][:, 0], stats[1][:, 0])
    total = sum(s[:, 1] * torch.exp(s[:, 0] - top) for s in stats)
    merged = torch.stack([top, total, stats[0][:, 2] + stats[1][:, 2]], 1)
    loss, _, count = registered.cross_entropy_loss(merged, targets, 500, "mean", -100, 0.0, 0.0)
    assert_close(loss.cpu(), F.cross_entropy(logits.double(), targets).cpu(), roundings=8)
    up = torch.ones((), device=device)
    grads = [
        registered.cross_entropy_gradient(
            part, targets, merged, up, None, count, start, 500, -100, 0.0, 0.0, None
        )
        for part, start in zip(parts, (0, cut), strict=True)
    ]
    leaf = logits.double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(leaf, targets), leaf)[0]
    assert_close(torch.cat(grads, 1).cpu(), truth.cpu(), sums=20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cols", [64, 1023])
def test_inplace_backward(cols, dtype, device):
    base, targets = draw((6, cols), dtype, device)
    leaf = base.requires_grad_()
    expected = torch.autograd.grad(ops.cross_entropy(leaf * 1, targets), leaf)[0]
    logits = leaf * 1
    loss = ops.cross_entropy(logits, targets, inplace_backward=True)
    other = logits.square().sum()  # keeps the logits too
    assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
    assert torch.equal(logits.detach(), expected)
    for late in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(late, leaf)
    gap = strided(leaf.detach()).requires_grad_()
    twice = (gap * 1).unsqueeze(1).expand(6, 3, cols)[:, 1]
    loss = ops.cross_entropy(twice, targets, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(loss, gap)[0], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_inplace_backward_is_refused_where_it_would_lose_a_leaf(device):
    logits, targets = draw((4, 9), torch.float32, device)
    leaf = logits.requires_grad_()
    for leafy in (leaf, leaf.view(4, 9)):
        with pytest.raises(RuntimeError, match="inplace_backward: expected logits that an op comp"):
            ops.cross_entropy(leafy, targets, inplace_backward=True)
    loss = ops.cross_entropy(leaf * 1, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    ops.cross_entropy(leaf.detach(), targets, inplace_backward=True)


@pytest.mark.parametrize("device", DEVICES)
def test_inplace_backward_under_compile_keeps_the_logits(device):
    leaf, targets = draw((4, 9), torch.float32, device)

    def both(x):
        logits = x * 2
        loss = ops.cross_entropy(logits, targets, inplace_backward=True)
        return loss, logits.square().sum()

    contract.compiles(
        lambda x, t: ops.cross_entropy(x * 2, t, inplace_backward=True), [leaf, targets]
    )
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    x = leaf.requires_grad_()
    ours = torch.autograd.grad(sum(compiled(x)), x)[0]
    plain = torch.autograd.grad(ops.cross_entropy(x * 2, targets) + (x * 2).square().sum(), x)[0]
    assert_close(ours, plain.double(), roundings=4)


def test_gradcheck():
    gradcheck(["mean", "none"])
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(
        lambda x: ops.cross_entropy(x, targets, return_log_sum_exp=True), (logits,)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.randn(4, 3, 8, device=device, requires_grad=True)
    targets = torch.randint(0, 8, (4, 3), device=device)
    registered = torch.ops.redline
    for name in ("cross_entropy", "cross_entropy_with_log_sum_exp"):
        for arguments in ((), ("none", -100, 0.1, 1e-3, 30.0)):
            contract.passes_opcheck(getattr(registered, name), (logits, targets, *arguments))
    x, up = logits.detach(), torch.ones((), device=device)
    stats = registered.cross_entropy_statistics(x, targets, 0, None, None, True)
    checks = {
        "statistics": (x, targets, 0, 2.0, -100, True),
        "loss": (stats, targets, 8, "mean", -100, 0.1, 0.0),
        "gradient": (x, targets, stats, up, None, None, 0, 8, -100, 0.1, 0.0, None),
        "gradient_inplace": (x, targets, stats, up, None, None, 0, 8, -100, 0.1, 0.0, None),
    }
    for name, arguments in checks.items():
        op = getattr(registered, f"cross_entropy_{name}")
        contract.passes_opcheck(op, arguments, inner=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tracing(reduction, device):
    logits = randn(6, 3, 40, dtype=torch.float32, device=device)
    targets = torch.randint(0, 40, (6, 3), device=device)
    inputs = [logits, targets]

    def function(x, t):
        return ops.cross_entropy(x, t, reduction, -100, 0.1)

    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    contract.refuses_double_backward(lambda x: function(x, targets), [logits])
    if device == "cuda":
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_reads_the_logits_as_they_are(device):
    logits, targets = draw((4, 32), torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.cross_entropy(logits, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, ops.cross_entropy(logits, targets))
    leaf = logits.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.cross_entropy(leaf, targets)
    assert torch.autograd.grad(loss, leaf)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_targets_of_32_bits_and_of_no_rows(device):
    logits, targets = draw((4, 32), torch.float32, device)
    assert torch.equal(ops.cross_entropy(logits, targets.int()), ops.cross_entropy(logits, targets))
    assert ops.cross_entropy(logits[:0], targets[:0]).isnan()
    assert ops.cross_entropy(logits[:0], targets[:0], "sum") == 0
    assert ops.cross_entropy(logits[:0], targets[:0], "none").shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x, t = torch.randn(4, 8, device=device), torch.zeros(4, dtype=torch.long, device=device)
    for arguments, options, message in [
        ((x, x), {}, r"targets: expected classes as int64 or int32 \(soft targets are not built\)"),
        ((x, t[:3]), {}, r"targets: expected \[4\], not \[3\]"),
        ((x.long(), t), {}, "logits: expected a floating dtype, not Long"),
        ((x[0, 0], t[0]), {}, "logits: expected at least one dimension, not a scalar"),
        ((x, t, "average"), {}, "reduction: expected none, mean or sum, not average"),
        ((x, t), {"label_smoothing": 1.5}, r"label_smoothing: expected a number of \[0, 1\]"),
        ((x, t), {"z_loss": -1e-4}, "z_loss: expected a finite number of 0 or more, not -0.0001"),
        ((x, t), {"z_loss": float("nan")}, "z_loss: expected a finite number of 0 or more, not"),
        (
            (x, t),
            {"z_loss": float("inf")},
            "z_loss: expected a finite number of 0 or more, not inf",
        ),
        ((x, t), {"logit_softcap": 0.0}, "logit_softcap: expected more than 0, not 0"),
    ]:
        with pytest.raises(RuntimeError, match="cross_entropy: " + message):
            ops.cross_entropy(*arguments, **options)
    with pytest.raises(TypeError, match="weight"):
        ops.cross_entropy(x, t, weight=torch.ones(8, device=device))
    if device == "cuda":
        with pytest.raises(RuntimeError, match="targets: expected a tensor on cuda:0, not on cpu"):
            ops.cross_entropy(x, t.cpu())
        with pytest.raises(RuntimeError, match="no kernel for float64"):
            ops.cross_entropy(x.double(), t)
