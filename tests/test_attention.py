"""attention against float64: torch's kernels, the reference path, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import contract
import reference
from cases import DEVICES, DTYPES, randn, wide
from redline import ops
from tolerance import UNIT_ROUNDOFF, assert_close

# (batch, queries, keys, heads, kv_heads, head_dim)
SIZES = [
    (2, 16, 16, 4, 4, 32),
    (1, 33, 33, 4, 2, 64),
    (2, 1, 40, 4, 1, 16),
    (1, 7, 20, 2, 1, 8),
    (1, 20, 7, 2, 2, 8),
    (1, 5, 5, 2, 2, 5),
]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "scale": 0.3},
    "window": {"window": (3, 2)},
    "causal_window": {"causal": True, "window": (4, 9)},
    "before": {"window": (2, -1)},
    "softcap": {"softcap": 2.0, "causal": True},
}


def draw(size, dtype, device):
    batch, queries, keys, heads, kv_heads, dim = size
    q = randn(batch, queries, heads, dim, dtype=dtype, device=device, seed=1)
    k, v = (
        randn(batch, keys, kv_heads, dim, dtype=dtype, device=device, seed=seed) for seed in (2, 3)
    )
    return q, k, v


def excluded_by(queries, keys, causal=False, window=None, **_):
    """From the definition: each key's distance to the query's diagonal."""
    distance = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    before, after = window or (-1, -1)
    after = 0 if causal else after
    excluded = torch.zeros(queries, keys, dtype=torch.bool)
    if after >= 0:
        excluded |= distance > after
    if before >= 0:
        excluded |= distance < -before
    return excluded


def holds(outs, grads, upstream, inputs, truth_of):
    """Output and gradients within counted roundings: inputs' dtype for scores' inputs,
    probabilities and output, float32 inside. Gradients pass through twice as many."""
    leaves = wide(*inputs)
    truth = truth_of(*leaves)
    expected = torch.autograd.grad(truth, leaves, upstream.cpu().double())
    assert_close(outs.cpu(), truth.detach(), roundings=3, sums=16)
    largest = max(1.0, upstream.abs().max().item())
    for ours, theirs in zip(grads, expected, strict=True):
        u = UNIT_ROUNDOFF[ours.dtype] + 8 * UNIT_ROUNDOFF[torch.float32]
        error = (ours.cpu().double() - theirs).norm()
        assert error <= 6 * u * (theirs.norm() + largest), f"{error} of {theirs.norm()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward(options, size, dtype, device):
    inputs = draw(size, dtype, device)
    outs, grads, ups = contract.gradients(lambda *qkv: ops.attention(*qkv, **options), inputs)
    excluded = excluded_by(size[1], size[2], **options)
    scale, softcap = options.get("scale"), options.get("softcap")
    assert outs[0].is_contiguous()
    holds(
        outs[0],
        grads,
        ups[0],
        inputs,
        lambda *qkv: reference.attention(qkv, excluded, scale, None, softcap),
    )
    if softcap is None and not excluded.all(-1).any():
        q, k, v = (x.transpose(1, 2) for x in inputs)
        if device == "cuda" and dtype == torch.float32:  # as ops.attention: the same kernel
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        stock = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=~excluded.to(device),
            scale=scale,
            enable_gqa=True,
        ).transpose(1, 2)
        truth = reference.attention(wide(*inputs), excluded, scale).detach()
        assert_close(outs[0].cpu(), truth, roundings=3, sums=16, stock=stock.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sink_and_its_gradient(dtype, device):
    inputs = [*draw(SIZES[1], dtype, device), randn(4, dtype=torch.float32, device=device)]
    outs, grads, ups = contract.gradients(
        lambda q, k, v, sink: ops.attention(q, k, v, causal=True, sink=sink), inputs
    )
    excluded = excluded_by(33, 33, causal=True)
    leaves = wide(*inputs)
    truth = reference.attention(leaves[:3], excluded, sink=leaves[3])
    expected = torch.autograd.grad(truth, leaves, ups[0].cpu().double())
    assert_close(outs[0].cpu(), truth.detach(), roundings=3, sums=16)
    for ours, theirs in zip(grads, expected, strict=True):
        u = 6 * UNIT_ROUNDOFF[dtype] + 64 * UNIT_ROUNDOFF[torch.float32]
        assert (ours.cpu().double() - theirs).norm() <= u * (theirs.norm() + 4)


PACKINGS = {  # cu_seqlens of queries and keys, where they start, tokens in memory
    "equal": ([0, 5, 12, 13], [0, 5, 12, 13], None, 13),
    "more_keys": ([0, 2, 5], [0, 7, 16], None, 16),
    "empty_sequence": ([0, 0, 6, 6], [0, 0, 6, 6], None, 6),
    "padded": ([0, 3, 8], [0, 3, 8], [0, 4, 12], 12),
    "slack": ([0, 3, 8], [0, 3, 8], None, 11),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("window", [None, (2, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_sequences_equal_their_own_attention(causal, window, packing, device):
    bounds_q, bounds_k, starts, tokens = packing
    tokens_q = bounds_q[-1] if bounds_q != bounds_k else tokens
    q = randn(tokens_q, 4, 8, dtype=torch.float32, device=device, seed=1)
    k, v = (randn(tokens, 2, 8, dtype=torch.float32, device=device, seed=s) for s in (2, 3))
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32, device=device) for b in (bounds_q, bounds_k))
    padded = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
    options = {"causal": causal, "window": window}

    def packed(*qkv):
        return ops.attention(
            *qkv,
            **options,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            cu_seqlens_q_padded=padded,
            cu_seqlens_k_padded=padded,
        )

    def one_by_one(q, k, v):
        out = torch.zeros_like(q)
        for i in range(len(bounds_q) - 1):
            length_q, length_k = (b[i + 1] - b[i] for b in (bounds_q, bounds_k))
            at_q, at_k = (starts[i],) * 2 if starts else (bounds_q[i], bounds_k[i])
            rows, cols = slice(at_q, at_q + length_q), slice(at_k, at_k + length_k)
            if length_q:
                excluded = excluded_by(length_q, length_k, **options)
                qkv = (q[None, rows], k[None, cols], v[None, cols])
                part = reference.attention(qkv, excluded)
                out = torch.cat([out[:at_q], part[0], out[at_q + length_q :]])
        return out

    outs, grads, ups = contract.gradients(packed, [q, k, v])
    holds(outs[0], grads, ups[0], [q, k, v], one_by_one)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics(device):
    q, k, v = draw(SIZES[1], torch.float32, device)
    sink = torch.randn(4, device=device)
    out, lse, top = ops.attention(
        q, k, v, causal=True, sink=sink, return_log_sum_exp=True, return_max_logit=True
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)).double() / 8
    scores = scores.masked_fill(excluded_by(33, 33, causal=True).to(device), float("-inf"))
    with_sink = torch.cat([scores, sink.double()[None, :, None, None].expand(1, 4, 33, 1)], -1)
    assert_close(lse.cpu(), torch.logsumexp(with_sink, -1).cpu(), roundings=8)
    assert_close(top.cpu(), scores.amax((0, 2, 3)).cpu(), roundings=8)
    assert torch.equal(out, ops.attention(q, k, v, causal=True, sink=sink))
    assert lse.shape == (1, 4, 33) and top.shape == (4,)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_plain_attention_runs_torchs_fused_kernel_without_a_mask(kv_heads, device):
    q, k, v = draw((2, 64, 64, 4, kv_heads, 64), torch.bfloat16, device)
    with Recorder() as recorder, torch.no_grad():
        ops.attention(q, k, v, causal=True)
        ops.attention(q[:, -1:], k, v, causal=True)
    names = [str(call) for call in recorder.calls]
    fused = [name for name in names if "_scaled_dot_product" in name and "choice" not in name]
    assert len(fused) == 2 and not any("math" in name for name in fused), names
    assert not any("where" in name or "masked_fill" in name for name in names), names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (8, 0)}])
def test_same_bits(options, dtype, device):
    """On CUDA by request: torch's backward is not repeatable there."""
    inputs = draw((2, 70, 70, 4, 2, 64), dtype, device)
    contract.same_bits(lambda *x: ops.attention(*x, **options, deterministic=True), inputs)
    out = ops.attention(*inputs, **options, deterministic=True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    # Two ways to compute it, each within 3 roundings and sums of 16 of the truth.
    assert_close(ops.attention(*strided, **options), out.double(), roundings=6, sums=32)
    packed = torch.cat([x.flatten(2) for x in inputs], -1).unflatten(-1, (8, 64))
    q, k, v = packed.split([4, 2, 2], 2)  # slices of one projection
    assert_close(ops.attention(q, k, v, **options), out.double(), roundings=6, sums=32)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_without_a_key_give_zeros(device):
    q, k, v = draw(SIZES[4], torch.float32, device)  # more queries than keys
    out = ops.attention(q, k, v, causal=True)
    assert not out[:, :13].any() and out[:, 13:].all()


def test_gradcheck():
    torch.utils.deterministic.fill_uninitialized_memory = False
    q, k, v = (x.requires_grad_() for x in draw((1, 4, 4, 2, 1, 4), torch.float64, "cpu"))
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, causal=True), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *x: ops.attention(*x[:3], window=(2, 1), softcap=3.0, sink=x[3]), (q, k, v, sink)
    )
    cu = torch.tensor([0, 1, 4])
    assert torch.autograd.gradcheck(
        lambda *x: ops.attention(*x, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu),
        tuple(x.detach()[0].clone().requires_grad_() for x in (q, k, v)),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    q, k, v = (x.requires_grad_() for x in draw((2, 8, 8, 4, 2, 16), torch.float32, device))
    cu = torch.tensor([0, 3, 8], device=device)
    for arguments, options in [
        ((q, k, v), {"causal": True}),
        ((q, k, v), {"window": [3, 1], "return_log_sum_exp": True}),
        ((q[0], k[0], v[0]), {"causal": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu}),
    ]:
        detached = [x.detach().requires_grad_() for x in arguments]
        contract.passes_opcheck(torch.ops.redline.attention, detached, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": (3, 0)}], ids=str)
def test_tracing(options, device):
    inputs = draw((5, 24, 24, 4, 2, 16), torch.float32, device)

    def function(q, k, v):
        return ops.attention(q, k, v, **options)

    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    if device == "cpu":  # small float32 on CUDA goes by torch's products, which have it
        contract.refuses_double_backward(function, inputs)
    if device == "cuda":
        # torch's backward gives other bits on each run there
        contract.captures(function, inputs, backward=False)
        contract.agrees_on_side_stream(function, inputs, backward=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, (4, 0)])
def test_autocast_follows_stock(window, device):
    q, k, v = draw(SIZES[0], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.attention(q, k, v, causal=True, window=window)
        stock = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert out.dtype == stock.dtype
    half = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, window=window)
    assert_close(out, half.double(), roundings=2)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    q, k, v = draw(SIZES[1], torch.float32, device)
    cu = torch.tensor([0, 3], device=device)
    for arguments, options, message in [
        ((q[0], k[0], v[0]), {}, r"q: expected \[batch, queries, heads, head_dim\]"),
        ((q, k, v), {"cu_seqlens_q": cu}, "cu_seqlens_k: expected beside cu_seqlens_q"),
        (
            (q, k, v),
            {"cu_seqlens_q": cu, "cu_seqlens_k": cu},
            r"q: expected \[tokens, heads, head_dim\] beside cu_seqlens",
        ),
        (
            (q[0], k[0], v[0]),
            {"cu_seqlens_q": cu.float(), "cu_seqlens_k": cu},
            r"cu_seqlens_q: expected \[sequences \+ 1\] int32 or int64, not \[2\] Float",
        ),
        ((q, k.bfloat16(), v), {}, "k: expected Float, not BFloat16"),
        ((q, k[..., :8], v), {}, "k: expected a head_dim of 64, not 8"),
        ((q, k, v[:, :5]), {}, r"v: expected the keys and heads of k \[1, 33, 2, 64\]"),
        ((q[:, :, :3], k, v), {}, "k: expected kv_heads that divide 3 heads, not 2"),
        ((q, k, v), {"dropout": 0.1}, "dropout: expected 0, not 0.1"),
        ((q, k, v), {"window": (-2, 0)}, "window: expected keys before and after, -1 for all"),
        ((q, k, v), {"softcap": 0.0}, "softcap: expected more than 0, not 0"),
        ((q, k, v), {"sink": q[0, 0, 0]}, r"sink: expected \[4\], not \[64\]"),
        ((q, k, v), {"rng_state": cu}, "rng_state: expected none, dropout is not built"),
    ]:
        with pytest.raises(RuntimeError, match="attention: " + message):
            ops.attention(*arguments, **options)
