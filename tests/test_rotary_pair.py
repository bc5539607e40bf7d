"""rotary_pair: against float64 and the bits of two calls of rotary, and what the laws ask."""

import pytest
import torch

import contract
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from test_rotary import boundaries, by_layout, case_name, expected, tables
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (batch, seq, q heads, k heads, head_dim, rotary_dim): groups, one key head, more of k than of q,
# as many, of either none, partial, odd, empty, real.
CASES = [
    (2, 3, 1, 1, 2, 2),
    (1, 7, 6, 2, 6, 6),
    (2, 5, 3, 7, 33, 10),
    (3, 9, 5, 5, 64, 32),
    (1, 4, 3, 2, 200, 0),
    (2, 4, 0, 3, 8, 8),
    (2, 4, 3, 0, 8, 8),
    (2, 0, 3, 1, 8, 8),
    (2, 33, 32, 8, 128, 128),
    (1, 2, 2, 1, 2310, 2310),
]
pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
layouts = pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])


def q_and_k(device, dtype=torch.float32, case=(2, 5, 6, 2, 16), layout="bshd"):
    batch, seq, q_heads, k_heads, head_dim = case[:5]
    return [
        by_layout(randn(batch, seq, heads, head_dim, dtype=dtype, device=device, seed=i), layout)
        for i, heads in enumerate((q_heads, k_heads))
    ]


def two_calls(q, k, *args, **options):
    return ops.rotary(q, *args, **options), ops.rotary(k, *args, **options)


@pairings
@dtypes
@pytest.mark.parametrize("case", CASES, ids=case_name)
@layouts
def test_forward_and_backward(layout, case, dtype, interleaved, device):
    batch, seq = case[:2]
    given = q_and_k(device, dtype, case, layout)
    both = tables(max(seq, 1) + 2, case[-1], device)
    cu_seqlens = boundaries(batch, seq, device) if layout == "thd" else None
    options = {"interleaved": interleaved, "layout": layout, "cu_seqlens": cu_seqlens}
    results, grads, upstreams = contract.gradients(
        lambda q, k: ops.rotary_pair(q, k, *both, **options), given
    )
    positions = torch.arange(seq).expand(batch, seq)
    for x, y, x_grad, upstream in zip(given, results, grads, upstreams, strict=True):
        (x64,) = wide(x)
        y64 = expected(x64, both, positions, interleaved, layout)
        (x64_grad,) = torch.autograd.grad(y64, [x64], upstream.cpu().double())
        assert y.dtype == dtype and y.is_contiguous()
        assert_close(y.cpu(), y64, dtype, sums=2)
        assert_close(x_grad.cpu(), x64_grad, dtype, sums=2, what="the gradient")


@pairings
@dtypes
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_bits_of_two_calls(case, dtype, interleaved, device):
    """Of contiguous tensors, of strided ones, and of heads before tokens, each with positions."""
    batch, seq = case[:2]
    both = tables(40, case[-1], device)
    q, k = q_and_k(device, dtype, case)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    apart = [x.mT.contiguous().mT for x in (q, k)]  # head_dim is not adjacent
    positions = torch.randint(0, 40, (batch, seq)).to(device)
    for given in ([q, k], [strided(q), strided(k)], [q, strided(k)], heads_first, apart):
        for rows in (None, positions):
            args = (*both, rows, interleaved)
            ours, grads, upstreams = contract.gradients(
                lambda q, k, args=args: ops.rotary_pair(q, k, *args), given
            )
            theirs, expected_grads, _ = contract.gradients(
                lambda q, k, args=args: two_calls(q, k, *args), given, upstreams
            )
            contract.equal_bits([*ours, *grads], [*theirs, *expected_grads])


def test_positions_restart_at_each_boundary(device):
    cu_seqlens = torch.tensor([0, 3, 3, 8], device=device)  # two tokens behind the last boundary
    q, k = q_and_k(device, case=(1, 10, 4, 2, 8), layout="thd")
    options = {"layout": "thd", "cu_seqlens": cu_seqlens}
    both = tables(5, 8, device)
    contract.equal_bits(ops.rotary_pair(q, k, *both, **options), two_calls(q, k, *both, **options))


def test_gradients_as_attention_gives_them(device):
    both = tables(5, 12, device)
    leaves = [x.requires_grad_() for x in q_and_k(device)]
    results = ops.rotary_pair(*leaves, *both)
    upstreams = [torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2) for y in results]
    ours = torch.autograd.grad(results, leaves, upstreams)
    theirs = torch.autograd.grad(two_calls(*leaves, *both), leaves, upstreams)
    contract.equal_bits(ours, theirs)


@pytest.mark.parametrize("wanted", [0, 1], ids=["q", "k"])
@pytest.mark.parametrize("why", ["a leaf", "asked for", "a result"])
def test_one_gradient_turns_one_tensor(why, wanted, device):
    """The other needs none, is not asked for, or its result has none."""
    both = tables(5, 12, device)
    given = q_and_k(device)
    for i, x in enumerate(given):
        x.requires_grad_(why != "a leaf" or i == wanted)
    results = ops.rotary_pair(*given, *both)
    if why == "a leaf":
        assert [y.requires_grad for y in results] == [x.requires_grad for x in given]
    upstreams = [torch.randn_like(y) for y in results]
    kept = [i for i, y in enumerate(results) if y.requires_grad]
    kept = [wanted] if why == "a result" else kept
    names = []
    with contract.seen_calls(names):
        (grad,) = torch.autograd.grad(
            [results[i] for i in kept], [given[wanted]], [upstreams[i] for i in kept]
        )
    alone = ops.rotary(given[wanted], *both)
    assert torch.equal(grad, torch.autograd.grad(alone, given[wanted], upstreams[wanted])[0])
    names = [name for name in names if name.startswith("redline::")]
    assert names == ["redline::rotary_backward"]


def test_both_gradients_are_one_call(device):
    both = tables(5, 12, device)
    names = []
    with contract.seen_calls(names):
        contract.gradients(lambda q, k: ops.rotary_pair(q, k, *both), q_and_k(device))
    names = [name for name in names if name.startswith("redline::")]
    assert names == ["redline::rotary_pair_forward", "redline::rotary_pair_backward"]


def test_same_bits(device):
    both = tables(64, 64, device)
    q, k = q_and_k(device, torch.bfloat16, (8, 64, 8, 2, 64))
    contract.same_bits(lambda q, k: ops.rotary_pair(q, k, *both), [q, k])
    y, z = ops.rotary_pair(q, k, *both)
    one = ops.rotary_pair(q[2:3], k[2:3], *both)
    contract.equal_bits(one, [y[2:3], z[2:3]])


def test_keeps_only_the_tables_and_returns_no_alias(device):
    cos, sin = tables(5, 0, device)
    q, k = (x.requires_grad_() for x in q_and_k(device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = ops.rotary_pair(q, k, cos, sin)
    assert {tensor.data_ptr() for tensor in kept} <= {cos.data_ptr(), sin.data_ptr()}
    contract.equal_bits(results, [q, k])
    assert len({x.untyped_storage().data_ptr() for x in (q, k, *results)}) == 4


BAD = {
    "q's rank": (dict(q=(4, 2, 8)), "rotary_pair: q: expected a rank of 4 with layout bshd, not 3"),
    "k's rank": (dict(k=(4, 2, 8)), "rotary_pair: k: expected a rank of 4 with layout bshd, not 3"),
    "k's batch": (
        dict(k=(1, 4, 2, 8)),
        r"rotary_pair: k: expected \[2, 4, heads, 8\] float32, not \[1, 4, 2, 8\] float32",
    ),
    "k's length": (
        dict(k=(2, 3, 2, 8)),
        r"rotary_pair: k: expected \[2, 4, heads, 8\] float32, not \[2, 3, 2, 8\] float32",
    ),
    "k's head_dim": (
        dict(k=(2, 4, 2, 6)),
        r"rotary_pair: k: expected \[2, 4, heads, 8\] float32, not \[2, 4, 2, 6\] float32",
    ),
    "k's dtype": (
        dict(k_dtype=torch.bfloat16),
        "rotary_pair: k: expected Float, as q is, not BFloat16",
    ),
    "q's dtype": (
        dict(q_dtype=torch.int32, k_dtype=torch.int32),
        "rotary_pair: q: expected a floating dtype, not Int",
    ),
    "layout": (dict(layout="hsbd"), "rotary_pair: layout: expected bshd, sbhd or thd, not hsbd"),
    "boundaries": (
        dict(cu_seqlens=[0, 4]),
        "rotary_pair: cu_seqlens: expected none with layout bshd, only thd has boundaries",
    ),
    "positions": (
        dict(positions=[0, 1]),
        r"rotary_pair: positions: expected \[4\] or \[2, 4\], not \[2\]",
    ),
    "wide table": (
        dict(table=(4, 10)),
        "rotary_pair: cos: expected at most 4 columns for a head_dim of 8, not 5",
    ),
    "short table": (
        dict(table=(3, 8), q=(2, 4, 0, 8)),
        "rotary_pair: cos: expected at least 4 positions, not 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, device):
    options, message = BAD[name]
    options = dict(options)
    cos, sin = tables(*options.pop("table", (4, 8)), device)
    q, k = (
        torch.zeros(
            options.pop(x, (2, 4, 2, 8)),
            dtype=options.pop(f"{x}_dtype", torch.float32),
            device=device,
        )
        for x in "qk"
    )
    for key in ("positions", "cu_seqlens"):
        if key in options:
            options[key] = torch.tensor(options[key], device=device)
    with pytest.raises(RuntimeError, match=message):
        ops.rotary_pair(q, k, cos, sin, **options)


def test_bad_tables_and_positions(device):
    q, k = q_and_k(device)
    cos, sin = tables(9, 16, device)
    with pytest.raises(RuntimeError, match="rotary_pair: sin: expected the shape of cos"):
        ops.rotary_pair(q, k, cos, sin[:5].contiguous())
    message = "rotary_pair: cos: expected a table that needs no gradient"
    with pytest.raises(RuntimeError, match=message):
        ops.rotary_pair(q, k, cos.clone().requires_grad_(), sin)
    positions = torch.tensor([0, 9, 2, 8, 1], device=device)
    if device == "cpu":
        message = "rotary_pair: positions: expected positions from 0 to 8, not 9"
        with pytest.raises(RuntimeError, match=message):
            ops.rotary_pair(q, k, cos, sin, positions)
        return
    for y in ops.rotary_pair(q, k, cos, sin, positions):
        assert y[:, 1].isnan().all() and not y[:, [0, 2, 3, 4]].isnan().any()


def test_opcheck(device):
    both = tables(5, 12, device)
    q, k = q_and_k(device)
    positions = torch.tensor([1, 0, 2, 4, 3], device=device)
    public = torch.ops.redline.rotary_pair.default
    thd = [x.flatten(0, 1).requires_grad_() for x in (q, k)]
    cu_seqlens = {"cu_seqlens": boundaries(2, 5, device)}
    contract.passes_opcheck(public, (*thd, *both, None, True, "thd"), cu_seqlens)
    for op in (torch.ops.redline.rotary_pair_forward, torch.ops.redline.rotary_pair_backward):
        args = (q, k, *both, positions, None, False, "bshd")
        contract.passes_opcheck(op.default, args, inner=True)
    contract.passes_opcheck(public, (q, k.requires_grad_(), *both))
    contract.passes_opcheck(public, (q.requires_grad_(), k, *both, positions))


@pairings
def test_gradcheck(interleaved, device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    both = tables(3, 6)
    given = [torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2)]
    assert torch.autograd.gradcheck(
        lambda q, k: ops.rotary_pair(q, k, *both, None, interleaved), given
    )


def test_compiles_and_exports(device):
    both = tables(5, 12, device)

    def op(q, k):
        return ops.rotary_pair(q, k, *both)

    given = q_and_k(device, case=(3, 5, 6, 2, 16))  # no two symbolic sizes are equal
    contract.compiles(op, given)
    contract.compiles_dynamic(op, given)
    contract.exports(op, given)
    contract.runs_in_inference_mode(op, given)


def test_autocast_follows_the_tensors(device):
    both = tables(5, 16, device)
    q, k = q_and_k(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            results = ops.rotary_pair(q.to(dtype), k.to(dtype), *both)
            assert [y.dtype for y in results] == [dtype, dtype]


def test_refuses_vmap_and_second_derivatives(device):
    both = tables(5, 16, device)

    def together(q, k):
        return torch.cat(ops.rotary_pair(q, k, *both), 2)

    given = q_and_k(device)
    contract.refuses_vmap(together, given)
    contract.refuses_double_backward(lambda q, k: together(q, k).square(), given)
    contract.refuses_a_tangent_in_backward(together, given)


def test_graphs_and_streams(device):
    if device != "cuda":
        pytest.skip("CUDA graphs and streams")
    both = tables(64, 64, device)

    def together(q, k):
        return torch.cat(ops.rotary_pair(q, k, *both), 2)

    given = q_and_k(device, torch.bfloat16, (8, 64, 8, 2, 64))
    contract.captures(together, given)
    contract.agrees_on_side_stream(together, given)
