"""cross_entropy with `return_predictions`: torch.argmax out of the loss's own read."""
# Over budget: parameters: a test has one for each thing that is varied.

import math

import pytest
import torch

import cases
import contract
import redline
from cases import DEVICES, DTYPES, randn, strided
from loss_cases import OPTIONS, draw, extreme
from redline import ops

pytestmark = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
promises = pytest.mark.parametrize("promised", [False, True], ids=["plain", "promised"])
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])

# (rows, vocabulary): one class, less than a vector, odd rows, no rows, blocks' edges; on CUDA rows
# of a warp, of a block and of clusters of 2, 4 and 8 (the last part short), and beyond a cluster.
SIZES = [(1, 1), (3, 7), (2, 33), (9, 255), (0, 64), (300, 8), (5, 4096), (9, 4097), (7, 1023)]
SIZES += [(4, 32000), (3, 50257), (3, 50304), (2, 128256)]
SIZES_CUDA = [(2, 151936), (3, 262144), (2, 320000), (2, 100007)]


def predicted(logits, targets, *arguments, promised=False, **options):
    """(results, gradient): with the promise's upstream gradient."""
    leaf = logits.detach().requires_grad_()
    scale = torch.tensor(0.7, device=logits.device) if promised else None
    out = ops.cross_entropy(
        leaf, targets, *arguments, loss_scale=scale, return_predictions=True, **options
    )
    up = torch.full_like(out[0].detach(), 0.7)
    return out, torch.autograd.grad(out[0], leaf, up)[0]


def compare(case, dtype, device, promised, options):
    """The predictions of argmax, and all else as it is without them."""
    logits, targets = draw(case, dtype, device, ignored=case[0] // 3)
    (loss, predictions), grad = predicted(logits, targets, "sum", promised=promised, **options)
    assert predictions.dtype == torch.int64 and not predictions.requires_grad
    assert torch.equal(predictions, logits.argmax(-1))
    leaf = logits.detach().requires_grad_()
    scale = torch.tensor(0.7, device=device) if promised else None
    other = ops.cross_entropy(leaf, targets, "sum", loss_scale=scale, **options)
    expected = torch.autograd.grad(other, leaf, torch.tensor(0.7, device=device))[0]
    contract.equal_bits([loss, grad], [other, expected])


@pytest.mark.parametrize("case", SIZES, ids=cases.name)
@dtypes
@promises
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_predictions_beside_the_same_loss_and_gradient(options, promised, dtype, case, device):
    compare(case, dtype, device, promised, options)


@pytest.mark.parametrize("case", SIZES_CUDA, ids=cases.name)
@dtypes
@promises
def test_rows_of_a_cluster(promised, dtype, case, device):
    if device == "cpu":
        pytest.skip("clusters are CUDA's")
    compare(case, dtype, device, promised, {})


@pytest.mark.parametrize("cols", [40, 1000, 2504, 4097, 101024])
@dtypes
@promises
def test_the_first_of_equal_logits(promised, dtype, cols, device):
    """Two, in every distance and order that threads, vectors, tiles and blocks can lie in; all."""
    places = [(a, b) for a in (0, 5, cols // 2, cols - 9) for b in (a + 1, a + 8, cols - 1)]
    logits, targets = draw((len(places) + 3, cols), dtype, device)
    logits.clamp_(max=2)
    for row, (a, b) in enumerate(places):
        logits[row, a] = logits[row, b] = 3
    logits[-3] = 1
    logits[-2], logits[-2, 3], logits[-2, 5] = -1, -0.0, 0.0
    logits[-1] = torch.finfo(dtype).min
    (_, predictions), _ = predicted(logits, targets, promised=promised)
    assert predictions.tolist() == [a for a, _ in places] + [0, 3, 0]


@pytest.mark.parametrize("cols", [2504, 101024])
@dtypes
@promises
def test_extreme_logits(promised, dtype, cols, device):
    logits, targets = extreme(cols, cols - 50, dtype, device)
    for options in ({}, {"logit_softcap": 30.0}):
        (_, predictions), _ = predicted(logits, targets, promised=promised, **options)
        assert torch.equal(predictions.cpu(), logits.cpu().argmax(-1))
    assert predictions[2] == 0 and predictions[6] == 100 and predictions[7] == cols - 1


@pytest.mark.parametrize("cols", [9, 1000, 4097, 101024])
@dtypes
@promises
def test_the_first_nan_is_above_all(promised, dtype, cols, device):
    logits, targets = draw((7, cols), dtype, device)
    nan, inf = math.nan, math.inf
    logits[0, cols - 1] = nan
    logits[1, 2] = logits[1, cols - 1] = nan
    logits[2] = nan
    logits[3, 1], logits[3, cols // 2] = inf, nan
    logits[4, 3], logits[4, cols - 2] = nan, inf
    logits[5] = -inf
    logits[5, cols // 3] = nan
    logits[6, 4] = logits[6, cols - 3] = inf
    (_, predictions), _ = predicted(logits, targets, promised=promised)
    expected = [cols - 1, 2, 0, cols // 2, 3, cols // 3, 4]
    assert predictions.tolist() == expected == logits.cpu().argmax(-1).tolist()


@dtypes
@promises
def test_a_softcap_does_not_enter(promised, dtype, device):
    """Logits that the softcap makes one number."""
    logits, targets = draw((3, 4096), dtype, device)
    logits[0, 17], logits[0, 3000] = 1000, 1024
    logits[1, 9], logits[1, 2000], logits[1, 4095] = 512, 1024, 768
    logits[2, 4000], logits[2, 1] = 2048, 1920
    (_, predictions), _ = predicted(logits, targets, promised=promised, logit_softcap=2.0)
    assert predictions.tolist() == [3000, 2000, 4000]


@dtypes
@promises
@pytest.mark.parametrize("cols", [1568, 4097, 50304])
def test_bits_do_not_depend_on_strides_threads_or_neighbours(cols, promised, dtype, device):
    logits, targets = draw((12, cols), dtype, device)
    logits = logits.round()  # with equal largest logits
    (_, expected), _ = predicted(logits, targets, promised=promised)
    assert torch.equal(expected.cpu(), logits.cpu().argmax(-1))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            (_, again), _ = predicted(logits, targets, promised=promised)
            assert torch.equal(again, expected)
    finally:
        torch.set_num_threads(threads)
    aligned = torch.zeros(12, cols + 64, dtype=dtype, device=device)[:, :cols]
    aligned.copy_(logits)
    for apart in (strided(logits), aligned):
        (_, again), _ = predicted(apart, targets, promised=promised)
        assert torch.equal(again, expected)
    for row in range(12):
        one = slice(row, row + 1)
        (_, alone), _ = predicted(logits[one], targets[one], promised=promised)
        assert torch.equal(alone, expected[one])


@promises
@reductions
def test_ignored_rows_have_predictions_and_no_gradient(reduction, promised, device):
    """Rows that a gradient of NaN, 0 times inf, would come of, too."""
    for ignored, index in ((-100, -100), (3, 3)):
        logits, targets = draw((6, 64), torch.bfloat16, device)
        targets.clamp_(min=4)
        targets[:4] = ignored
        logits[1, 5], logits[2, 6], logits[3] = math.nan, math.inf, -math.inf
        (loss, predictions), grad = predicted(
            logits, targets, reduction, index, promised=promised, inplace_backward=False
        )
        assert torch.equal(predictions.cpu(), logits.cpu().argmax(-1))
        assert not grad[:4].any() and grad[4:].isfinite().all() and loss.isfinite().all()


@dtypes
@promises
@pytest.mark.parametrize("cols", [64, 1023, 50304])
def test_the_gradient_over_the_logits(cols, promised, dtype, device):
    """In a promise's forward the predictions are those of the logits that it writes over."""
    base, targets = draw((6, cols), dtype, device, ignored=2)
    leaf, expected = base.clone().requires_grad_(), base.argmax(-1)
    logits = leaf * 1
    loss, predictions = ops.cross_entropy(
        logits,
        targets,
        inplace_backward=True,
        loss_scale=1.0 if promised else None,
        return_predictions=True,
    )
    ours = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(predictions, expected)
    other = base.clone().requires_grad_()
    plain = ops.cross_entropy(other, targets, loss_scale=1.0 if promised else None)
    assert torch.equal(ours, torch.autograd.grad(plain, other)[0])


def test_with_log_sum_exp(device):
    logits, targets = draw((6, 333), torch.float32, device, ignored=2)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    loss, lse, predictions = ops.cross_entropy(
        leaf, targets, return_log_sum_exp=True, return_predictions=True
    )
    expected = ops.cross_entropy(other, targets, return_log_sum_exp=True)
    contract.equal_bits([loss, lse, predictions], [*expected, logits.argmax(-1)])
    ours = torch.autograd.grad(loss + lse.sum(), leaf)
    contract.equal_bits(ours, torch.autograd.grad(expected[0] + expected[1].sum(), other))
    with pytest.raises(RuntimeError, match="loss_scale: expected none with log_sum_exp"):
        ops.cross_entropy(
            leaf, targets, loss_scale=1.0, return_log_sum_exp=True, return_predictions=True
        )


@promises
def test_without_a_gradient(promised, device):
    scale = 1.0 if promised else None
    logits, targets = draw((6, 40), torch.float32, device)
    options = {"loss_scale": scale, "return_predictions": True}
    loss, predictions = ops.cross_entropy(logits, targets, **options)
    assert torch.equal(predictions, logits.argmax(-1)) and not loss.requires_grad
    row = ops.cross_entropy(logits[2], targets[2].int(), "none", **options)
    assert row[1].shape == () and row[1] == predictions[2]
    cube = logits.view(2, 3, 40)
    both = ops.cross_entropy(cube, targets.view(2, 3), return_predictions=True)[1]
    assert torch.equal(both, predictions.view(2, 3))


def test_a_vocabulary_in_slices(device):
    """Law 10: the slice whose maximum is the largest, the first of equal ones, has the row's."""
    logits, targets = draw((40, 500), torch.bfloat16, device)
    registered, cut = torch.ops.redline.cross_entropy_statistics_with_predictions, 201
    parts = ((logits[:, :cut], 0), (logits[:, cut:], cut))
    (left, first), (right, second) = (registered(part, targets, at) for part, at in parts)
    assert torch.equal(torch.where(left[:, 0] >= right[:, 0], first, second), logits.argmax(-1))
    assert second.min() >= cut
    with pytest.raises(RuntimeError, match="predictions: expected no logit_softcap with a voc"):
        registered(logits[:, cut:], targets, cut, 5.0)


@promises
def test_explain_counts_one_read(promised, device):
    """And a promise's one write."""
    logits, targets = draw((16, 4096), torch.float32, device)
    leaf = logits.requires_grad_(promised)
    scale = torch.ones((), device=device) if promised else None
    found = redline.explain(
        ops.cross_entropy, leaf, targets, loss_scale=scale, return_predictions=True
    )
    op = "promise" if promised else "statistics"
    assert f"cross_entropy_{op}_with_predictions" in {launch.op for launch in found.launches}
    assert found.forward_bytes < (2.1 if promised else 1.1) * logits.nbytes


def test_a_row_of_no_class_is_refused(device):
    logits, targets = torch.zeros(2, 0, device=device), torch.full((2,), -100, device=device)
    with pytest.raises(RuntimeError, match="predictions: expected at least one class, not logits"):
        ops.cross_entropy(logits, targets, return_predictions=True)


def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.randn(4, 3, 8, device=device, requires_grad=True)
    targets = torch.randint(0, 8, (4, 3), device=device)
    registered, one = torch.ops.redline, torch.ones((), device=device)
    op = registered.cross_entropy_with_predictions
    options = ({}, {"with_log_sum_exp": True}, {"loss_scale": one})
    for given in options:
        contract.passes_opcheck(op, (logits, targets, "sum", -100, 0.1, 1e-3, 30.0), given)
    x = logits.detach()
    rest = (x, targets, one, "mean", -100, 0.1, 1e-3, 30.0)
    for name, arguments in (
        ("statistics_with_predictions", (x, targets, 0, 2.0, True)),
        ("promise_with_predictions", rest),
        ("promise_inplace_with_predictions", rest),
    ):
        contract.passes_opcheck(getattr(registered, f"cross_entropy_{name}"), arguments, inner=True)


@promises
@reductions
def test_tracing(reduction, promised, device):
    logits = randn(6, 3, 40, dtype=torch.float32, device=device)
    targets = torch.randint(0, 40, (6, 3), device=device)
    inputs = [logits, targets]
    # The upstream gradient that contract.gradients draws for a scalar.
    drawn = torch.randn((), generator=torch.Generator().manual_seed(7)).item()

    def both(x, t):
        scale = drawn if promised else None
        return ops.cross_entropy(
            x, t, reduction, -100, 0.1, loss_scale=scale, return_predictions=True
        )

    def function(x, t):
        """One number that both are seen in."""
        loss, predictions = both(x, t)
        return loss.sum() + predictions.sum()

    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(both, inputs)
    contract.runs_in_inference_mode(both, inputs)
    if not promised:
        contract.refuses_double_backward(lambda x: both(x, targets)[0], [logits])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    contract.equal_bits(compiled(*inputs), both(*inputs))
    if device == "cuda" and (reduction == "mean" or not promised):
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


def test_autocast_reads_the_logits_as_they_are(device):
    logits, targets = draw((4, 32), torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, predictions = ops.cross_entropy(logits, targets, return_predictions=True)
    assert torch.equal(loss, ops.cross_entropy(logits, targets))
    assert torch.equal(predictions, logits.argmax(-1))
