"""Permutation, chunks and padding of experts' rows, against loops, in both directions."""

import pytest
import torch

import contract
from cases import DEVICES, randn
from redline.extensions import transformer_engine as te
from tolerance import assert_close

TOKENS, EXPERTS, HIDDEN = 13, 5, 8

devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def routed(device, tokens=TOKENS):
    """A map with experts of no token, and tokens of no, one and many experts."""
    mask = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[:, 3] = False
    mask[0] = False
    return mask.to(device)


def loop(mask, rows=None):
    """(token, expert) of each row, expert by expert."""
    mask = mask.cpu()
    pairs = [(t, e) for e in range(EXPERTS) for t in range(len(mask)) if mask[t, e]]
    return pairs if rows is None else pairs[:rows]


def padded_loop(mask, align):
    """As loop, each expert's rows filled up with None."""
    rows = []
    for expert in range(EXPERTS):
        own = [pair for pair in loop(mask) if pair[1] == expert]
        rows += own + [None] * (-len(own) % align)
    return rows


def leaf(*shape, device, dtype=torch.float32, seed=0):
    return randn(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()


def summed(grad, rows, tokens=TOKENS):
    """What each token gets of the rows' gradients, in float64."""
    total = torch.zeros(tokens, grad.shape[1], dtype=torch.float64)
    for row, pair in enumerate(rows):
        if pair is not None:
            total[pair[0]] += grad[row].double().cpu()
    return total


@devices
@dtypes
def test_permute(dtype, device):
    mask, x = routed(device), leaf(TOKENS, HIDDEN, dtype=dtype, device=device)
    rows = loop(mask)
    y, row_id_map = te.fused_permute(x, mask, len(rows))
    assert torch.equal(y, torch.stack([x[token] for token, _ in rows]))
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert_close(grad.cpu(), summed(upstream, rows), dtype, sums=4)
    for count in (-1, None, torch.tensor(len(rows))):
        counted, again = te.fused_permute(x, mask.int(), count)
        assert torch.equal(counted, y) and torch.equal(again, row_id_map)


@devices
def test_row_id_map(device):
    mask = routed(device)
    rows = loop(mask)
    _, row_id_map = te.fused_permute(torch.ones(TOKENS, 1, device=device), mask, len(rows))
    assert row_id_map.dtype == torch.int32 and row_id_map.shape == (TOKENS, 2 * EXPERTS + 1)
    for token, line in enumerate(row_id_map.tolist()):
        own = [(row, pair[1]) for row, pair in enumerate(rows) if pair[0] == token][::-1]
        assert line[-1] == len(own)
        assert list(zip(line[: len(own)], line[EXPERTS:], strict=False)) == own
        assert set(line[len(own) : EXPERTS]) <= {-1}


@devices
@dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "merged"])
def test_unpermute(dtype, weighted, device):
    mask = routed(device)
    rows = loop(mask)
    x = torch.zeros(TOKENS, HIDDEN, device=device)
    row_id_map = te.fused_permute(x, mask, len(rows))[1]
    y = leaf(len(rows), HIDDEN, dtype=dtype, device=device, seed=1)
    probs = leaf(TOKENS, EXPERTS, device=device, seed=2) if weighted else None
    out = te.fused_unpermute(y, row_id_map, probs, x.shape)
    assert out.dtype == dtype and out.shape == x.shape
    y64 = y.detach().double().cpu().requires_grad_()
    probs64 = torch.ones(TOKENS, EXPERTS) if probs is None else probs.detach().cpu()
    probs64 = probs64.double().requires_grad_()
    expected = [torch.zeros(HIDDEN, dtype=torch.float64)] * TOKENS
    for row, (token, expert) in enumerate(rows):
        expected[token] = expected[token] + y64[row] * probs64[token, expert]
    expected = torch.stack(expected)
    assert_close(out.cpu(), expected, dtype, sums=6)
    upstream = torch.randn_like(out)
    leaves, truth = ([y, probs], [y64, probs64]) if weighted else ([y], [y64])
    grads = torch.autograd.grad(out, leaves, upstream)
    grads64 = torch.autograd.grad(expected, truth, upstream.cpu().double())
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert_close(grad.cpu(), grad64, dtype, sums=16, roundings=2)


@devices
def test_permute_with_probs(device):
    mask, x = routed(device), leaf(TOKENS, HIDDEN, device=device)
    probs = torch.rand(TOKENS, EXPERTS).to(device)
    rows = loop(mask)
    probs[rows[2]] = 0.0
    probs.requires_grad_()
    y, permuted, row_id_map = te.fused_permute_with_probs(x, probs, mask, len(rows))
    assert torch.equal(permuted, torch.stack([probs[pair] for pair in rows]))
    assert not y[2].any() and torch.equal(y[3], x[rows[3][0]])
    upstream = torch.randn_like(permuted)
    (grad,) = torch.autograd.grad(permuted, probs, upstream)
    expected = torch.zeros(TOKENS, EXPERTS, device=device)
    for row, pair in enumerate(rows):
        expected[pair] = upstream[row]
    assert torch.equal(grad, expected)
    assert torch.equal(row_id_map, te.fused_permute(x, mask, len(rows))[1])


@devices
@pytest.mark.parametrize("align", [1, 4])
def test_permute_and_pad(align, device):
    mask, x = routed(device), leaf(TOKENS, HIDDEN, device=device)
    probs = (torch.rand(TOKENS, EXPERTS) + 0.1).to(device).requires_grad_()
    counts, rows = mask.sum(0), padded_loop(mask, align)
    y, permuted, row_id_map, offsets, padded = te.fused_permute_and_pad_with_probs(
        x, probs, mask, counts, align
    )
    assert y.shape[0] == len(rows) == padded.sum() and (offsets is None) == (align == 1)
    for row, pair in enumerate(rows):
        if pair is None:
            assert not y[row].any() and permuted[row] == 0
        else:
            assert torch.equal(y[row], x[pair[0]]) and permuted[row] == probs[pair]
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert_close(grad.cpu(), summed(upstream, rows), sums=4)
    back = te.fused_unpermute(upstream, row_id_map, restore_shape=x.shape, pad_offsets=offsets)
    assert_close(back.cpu(), summed(upstream, rows), sums=4)


@devices
def test_rows_without_room_are_dropped(device):
    mask, x = routed(device), leaf(TOKENS, HIDDEN, device=device)
    rows = loop(mask, 6)
    y, row_id_map = te.fused_permute(x, mask, 6)
    assert torch.equal(y, torch.stack([x[token] for token, _ in rows]))
    back = te.fused_unpermute(y, row_id_map, restore_shape=x.shape)
    assert_close(back.cpu(), summed(y.detach(), rows), sums=4)
    more, _ = te.fused_permute(x, mask, len(loop(mask)) + 2)
    assert not more[-2:].any()


@devices
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "merged"])
def test_map_of_indices(weighted, device):
    slots = 2
    indices = torch.stack([torch.randperm(EXPERTS)[:slots] for _ in range(TOKENS)]).to(device)
    x = leaf(TOKENS, HIDDEN, device=device)
    y, row_id_map = te.fused_permute(x, indices, map_type="index")
    flat = [(int(e), t, k) for t, line in enumerate(indices) for k, e in enumerate(line)]
    rows = sorted(flat)
    assert torch.equal(y, torch.stack([x[token] for _, token, _ in rows]))
    probs = torch.rand(TOKENS, slots, device=device) if weighted else None
    out = te.fused_unpermute(y, row_id_map, probs, x.shape, map_type="index")
    factor = slots if probs is None else probs.sum(1, keepdim=True).cpu().double()
    assert_close(out.cpu(), x.detach().cpu().double() * factor, sums=4)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert_close(grad.cpu(), summed(upstream, [(t, e) for e, t, _ in rows]), sums=4)


@devices
def test_round_trip_is_the_identity_for_probabilities_of_one(device):
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool, device=device)
    mask[torch.arange(TOKENS), torch.arange(TOKENS) % EXPERTS] = True
    x = randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    y, _, row_id_map = te.fused_permute_with_probs(x, mask.float(), mask, TOKENS)
    assert torch.equal(te.fused_unpermute(y, row_id_map, mask.float(), x.shape), x)


@devices
def test_same_bits(device):
    mask, x = routed(device, 300), randn(300, 16, dtype=torch.float32, device=device)
    contract.same_bits(lambda x: te.fused_permute(x, mask, len(loop(mask)))[0], [x])
    row_id_map = te.fused_permute(x, mask)[1]
    rows = randn(len(loop(mask)), 16, dtype=torch.float32, device=device)
    contract.same_bits(lambda rows: te.fused_unpermute(rows, row_id_map), [rows])


@devices
def test_no_tokens(device):
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool, device=device)
    x = leaf(TOKENS, HIDDEN, device=device)
    y, row_id_map = te.fused_permute(x, mask)
    assert y.shape == (0, HIDDEN)
    out = te.fused_unpermute(y, row_id_map, restore_shape=x.shape)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()


SIZES, ORDER = [3, 0, 4, 2, 1], [2, 0, 4, 1, 3]


@devices
@pytest.mark.parametrize("tensors", [False, True], ids=["lists", "tensors"])
def test_sort_chunks(tensors, device):
    x, probs = leaf(10, HIDDEN, device=device), leaf(10, device=device, seed=1)
    sizes, order = SIZES, ORDER
    if tensors:
        sizes = torch.tensor(sizes, device=device)
        order = torch.tensor(order, dtype=torch.int32, device=device)
    y = te.fused_sort_chunks_by_index(x, sizes, order)
    chunks, parts = x.split(SIZES), probs.split(SIZES)
    expected = torch.cat([chunks[index] for index in ORDER])
    assert torch.equal(y, expected)
    again, permuted = te.fused_sort_chunks_by_index_with_probs(x, probs, sizes, order)
    expected_probs = torch.cat([parts[index] for index in ORDER])
    assert torch.equal(again, y) and torch.equal(permuted, expected_probs)
    upstream, of_probs = torch.randn_like(y), torch.randn_like(permuted)
    ours = torch.autograd.grad([again, permuted], [x, probs], [upstream, of_probs])
    theirs = torch.autograd.grad([expected, expected_probs], [x, probs], [upstream, of_probs])
    for grad, truth in zip(ours, theirs, strict=True):
        assert torch.equal(grad, truth)


@devices
@pytest.mark.parametrize("align", [None, 4])
def test_padding(align, device):
    splits, multiple = [3, 0, 16, 5], align or 16
    x = leaf(sum(splits), HIDDEN, device=device)
    y, padded = te.Fp8Padding(4, align)(x, splits)
    assert padded == [-(-rows // multiple) * multiple for rows in splits]
    blocks = zip(y.split(padded), x.split(splits), strict=True)
    for block, own in blocks:
        assert torch.equal(block[: len(own)], own) and not block[len(own) :].any()
    back = te.Fp8Unpadding(4, align)(y, splits)
    assert torch.equal(back, x)
    upstream = torch.randn_like(back)
    assert torch.equal(torch.autograd.grad(back, x, upstream)[0], upstream)
    even = leaf(2 * multiple, HIDDEN, device=device)
    assert te.Fp8Padding(2, align)(even, [multiple, multiple])[0] is even


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: te.fused_permute(torch.ones(2, 3), torch.ones(3, 3)),
            r"fused_permute: routing_map: expected \[tokens, experts\] beside inp \(2, 3\), "
            r"not \(3, 3\)",
        ),
        (
            lambda: te.fused_permute(torch.ones(2, 3), torch.ones(2, 3), map_type="bits"),
            "fused_permute: map_type: expected mask or index, not bits",
        ),
        (
            lambda: te.fused_unpermute(torch.ones(2, 3), torch.ones(2, 3), map_type="bits"),
            "fused_unpermute: map_type: expected mask or index, not bits",
        ),
        (
            lambda: te.Fp8Padding(2)(torch.ones(5, 3), [5]),
            "Fp8Padding: m_splits: expected 2 counts, not 1",
        ),
        (
            lambda: te.Fp8Unpadding(2, 4)(torch.ones(5, 3), [3, 2]),
            "Fp8Unpadding: inp: expected 8 rows, not 5",
        ),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        call()
