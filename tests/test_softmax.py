"""softmax against float64: masks from tensors and from indices, sinks, empty rows."""

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from tolerance import assert_close

# (batch, heads, queries, keys): one element, odd, a vector's edge, a block's edge, more queries.
SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 9, 33), (1, 2, 3, 1025), (2, 1, 8, 4), (1, 1, 2, 5000)]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "scale": 0.3},
    "window": {"window": 3},
    "causal_window": {"causal": True, "window": 2},
}


def excluded_by(queries, keys, causal=False, window=None, scale=1.0):
    """From the definition, key by key."""
    diagonal = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None]
    excluded = torch.zeros(queries, keys, dtype=torch.bool)
    if causal:
        excluded |= j > diagonal
    if window:
        excluded |= j <= diagonal - window
    return excluded


def inputs_of(shape, dtype, device):
    scores = randn(*shape, dtype=dtype, device=device, scale=2.0)
    mask = (randn(*shape, dtype=torch.float32, device=device, seed=3) > 0.8)[:, :1]
    sink = randn(shape[1], dtype=torch.float32, device=device, seed=4)
    return scores, mask, sink


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("full", [False, True], ids=["bare", "mask-sink"])
def test_forward_and_backward(full, options, shape, dtype, device):
    scores, mask, sink = inputs_of(shape, dtype, device)
    inputs = [scores, sink] if full else [scores]

    def ours(x, s=None):
        return ops.softmax(x, mask if full else None, **options, sink=s)

    outs, grads, ups = contract.gradients(ours, inputs)
    leaves = wide(*inputs)
    excluded = excluded_by(*shape[-2:], **options)
    excluded = excluded | mask.cpu() if full else excluded.expand(shape)
    truth = reference.softmax(leaves[0], excluded, options.get("scale", 1.0), *leaves[1:])
    expected = torch.autograd.grad(truth, leaves, ups[0].cpu().double())
    assert_close(outs[0].cpu(), truth.detach(), sums=32)
    # The saved probabilities are rounded once and meet their gradient in a difference.
    terms = (outs[0].double() * ups[0].double()).abs().max().item() * options.get("scale", 1.0)
    for ours_, theirs in zip(grads, expected, strict=True):
        error = (ours_.cpu().double() - theirs).abs().max().item()
        u = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        assert error <= u * (4 * terms + theirs.abs().max().item()) * max(1, len(ups[0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_error_is_within_twice_stock(dtype, device):
    scores = randn(2, 4, 64, 1024, dtype=dtype, device=device, scale=3.0)
    ours, grads, ups = contract.gradients(ops.softmax, [scores])
    stock, theirs, _ = contract.gradients(lambda x: torch.softmax(x, -1), [scores], ups)
    (leaf,) = wide(scores)
    truth = torch.softmax(leaf, -1)
    expected = torch.autograd.grad(truth, leaf, ups[0].cpu().double())[0]
    assert_close(ours[0].cpu(), truth.detach(), stock=stock[0].cpu(), sums=4)
    assert_close(grads[0].cpu(), expected, stock=theirs[0].cpu(), sums=4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_a_key_give_zeros(sink, device):
    scores = torch.randn(2, 2, 5, 3, device=device)
    sink = torch.randn(2, device=device) if sink else None
    mask = torch.zeros(5, 3, dtype=torch.bool, device=device)
    mask[3] = True
    leaf = scores.requires_grad_()
    out = ops.softmax(leaf, mask, causal=True, sink=sink)
    assert not out[..., :2, :].any() and not out[..., 3, :].any() and out[..., 4, :].all()
    grad = torch.autograd.grad(out.sum(), leaf)[0]
    assert grad.isfinite().all() and not grad[..., 3, :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_and_extreme_scores_follow_stock(device):
    scores = torch.randn(7, 1500, device=device)
    inf = float("inf")
    scores[0, :1400] = -inf
    scores[1], scores[2, 3], scores[3] = -inf, 3e38, -3e38
    scores[4, 9], scores[5, 9] = inf, float("nan")
    out, stock = ops.softmax(scores), torch.softmax(scores.double(), -1)
    stock[1] = 0  # stock gives NaN
    for row in range(7):
        assert_close(out[row].cpu(), stock[row].cpu(), sums=32, what=f"row {row}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_strides_threads_or_neighbours(dtype, device):
    scores, mask, sink = inputs_of((3, 4, 10, 333), dtype, device)
    many, wide_mask, _ = inputs_of((3, 4, 80, 333), dtype, device)
    contract.same_bits(lambda x, s: ops.softmax(x, wide_mask, 0.5, True, 9, s), [many, sink])
    contract.gradient_ignores_strides_and_neighbours(ops.softmax, [scores])
    out = ops.softmax(scores, mask, 0.5, True, sink=sink)
    assert torch.equal(ops.softmax(strided(scores), strided(mask), 0.5, True, sink=sink), out)
    swapped = scores.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.softmax(swapped, mask.expand(scores.shape), 0.5, True, sink=sink), out)
    for row in range(3):
        assert torch.equal(ops.softmax(scores[row], mask[row], 0.5, True, sink=sink), out[row])
    tall = ops.softmax(scores[None], mask[None], 0.5, True, sink=sink)
    assert torch.equal(tall[0], out)
    flat = ops.softmax(scores[0, 0])
    assert torch.equal(flat, ops.softmax(scores)[0, 0])
    assert torch.equal(ops.softmax(scores[0, 0, 0]), flat[0])
    assert ops.softmax(scores[:0]).shape == (0, 4, 10, 333)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [2200, 9000])
def test_heads_that_share_a_large_mask(keys, device):
    """On CUDA blocks then go over the heads of a query: each row has the bits of its head alone,
    and its sink's probability lies beside it, or the sink's gradient would be another."""
    shape = (2, 3, 3 + (18 << 20) // (5 * keys), keys)
    scores, mask, sink = inputs_of(shape, torch.bfloat16, device)

    def gradients(scores, mask, sink, upstream=None):
        return contract.gradients(
            lambda scores, sink: ops.softmax(scores, mask, sink=sink), [scores, sink], upstream
        )

    (out,), grads, (upstream,) = gradients(scores, mask, sink)
    sink_grad = torch.zeros(3, dtype=torch.float64)
    for batch in range(2):
        for head in range(3):
            own = slice(head, head + 1)
            alone = gradients(scores[batch, own], mask[batch], sink[own], [upstream[batch, own]])
            assert torch.equal(alone[0][0], out[batch, own])
            assert torch.equal(alone[1][0], grads[0][batch, own])
            sink_grad[head] += alone[1][1].item()
    assert_close(grads[1].cpu(), sink_grad, sums=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_mask_of_other_bits_than_one(dtype, device):
    """A bool that came from another type: what is not zero excludes its own key alone."""
    scores = randn(4, 6, 64, dtype=dtype, device=device)
    bits = torch.arange(4 * 64, device=device).reshape(4, 1, 64) * 37 % 5  # 0 to 4
    odd = (bits * 63).to(torch.uint8).view(torch.bool)  # 0, 63, 126, 189, 252
    contract.equal_bits([ops.softmax(scores, odd)], [ops.softmax(scores, bits != 0)])


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 1, 4, 5) > 0.8
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda x, s, o=options: ops.softmax(x, mask, **o, sink=s), (scores, sink)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    scores, mask, sink = inputs_of((2, 3, 4, 8), torch.float32, device)
    registered = torch.ops.redline
    leaf, sink_leaf = scores.clone().requires_grad_(), sink.clone().requires_grad_()
    contract.passes_opcheck(registered.softmax, (leaf,))
    contract.passes_opcheck(registered.softmax, (leaf, mask, 0.5, True, 3, sink_leaf))
    contract.passes_opcheck(
        registered.softmax_forward, (scores, mask, 0.5, True, 3, sink), inner=True
    )
    out, sinks = registered.softmax_forward(scores, mask, 0.5, True, 3, sink)
    contract.passes_opcheck(registered.softmax_backward, (out, out, sinks, 0.5), inner=True)


@pytest.mark.parametrize("device", DEVICES)
def test_tracing(device):
    scores, _, sink = inputs_of((6, 2, 4, 40), torch.float32, device)
    inputs = [scores, sink]

    def function(x, s):
        return ops.softmax(x, None, 0.5, True, 9, s)

    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    contract.refuses_double_backward(function, inputs)
    if device == "cuda":
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_follows_stock(device):
    scores = randn(4, 32, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.softmax(scores).dtype == torch.softmax(scores, -1).dtype


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    for arguments, message in [
        ((x.long(),), "scores: expected a floating dtype, not Long"),
        ((x[0, 0, 0, 0],), "scores: expected at least one dimension, not a scalar"),
        ((x, x), "mask: expected bool, not Float"),
        (
            (x, x[..., :2] > 0),
            r"mask: expected a shape that broadcasts to \[2, 3, 4, 5\], not \[2, 3, 4, 2\]",
        ),
        ((x, None, 1.0, False, 0), "window: expected 1 or more keys, not 0"),
        ((x, None, 1.0, False, None, x[0, 0, 0]), r"sink: expected \[3\], not \[5\]"),
    ]:
        with pytest.raises(RuntimeError, match="softmax: " + message):
            ops.softmax(*arguments)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="mask: expected a tensor on cuda:0, not on cpu"):
            ops.softmax(x, (x > 0).cpu())
        with pytest.raises(RuntimeError, match="no kernel for float64"):
            ops.softmax(x.double())
