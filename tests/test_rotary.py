"""rotary and qkv_rotary: against float64, in every layout, and what the laws ask."""

import functools

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (batch, seq, heads, head_dim, rotary_dim): odd, partial, one pair, over a vector, empty, real.
CASES = [
    (2, 3, 1, 2, 2),
    (1, 7, 3, 6, 6),
    (2, 5, 4, 33, 10),
    (3, 9, 2, 64, 32),
    (1, 4, 3, 200, 0),
    (2, 0, 3, 8, 8),
    (2, 33, 8, 128, 128),
    (1, 2, 2, 2310, 2310),
]


def case_name(case):
    return "x".join(map(str, case))


def tables(positions, rotary_dim, device="cpu"):
    angles = randn(positions, rotary_dim // 2, dtype=torch.float32, device="cpu", scale=3.0)
    return angles.cos().to(device), angles.sin().to(device)


def by_layout(x, layout):
    """[batch, seq, ...] as the layout has it."""
    if layout == "sbhd":
        return x.transpose(0, 1).contiguous()
    return x.flatten(0, 1) if layout == "thd" else x


def expected(x, tables, positions, interleaved, layout):
    """The reference of x in a layout, or stock's own in x's dtype; positions: [batch, seq]."""
    rows = by_layout(positions, layout).flatten()
    cos, sin = (table.cpu().to(x.dtype) for table in tables)
    return reference.rotary(x.flatten(0, -3), cos, sin, rows, interleaved).view(x.shape)


def boundaries(batch, seq, device):
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seq


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
def test_forward_and_backward(layout, case, dtype, interleaved, device):
    batch, seq, heads, head_dim, rotary_dim = case
    x = by_layout(randn(batch, seq, heads, head_dim, dtype=dtype, device=device), layout)
    cos, sin = tables(max(seq, 1) + 2, rotary_dim, device)
    cu_seqlens = boundaries(batch, seq, device) if layout == "thd" else None

    options = {"interleaved": interleaved, "layout": layout, "cu_seqlens": cu_seqlens}
    op = functools.partial(ops.rotary, cos=cos, sin=sin, **options)
    (y,), (x_grad,), (upstream,) = contract.gradients(op, [x])
    (x64,) = wide(x)
    positions = torch.arange(seq).expand(batch, seq)
    y64 = expected(x64, (cos, sin), positions, interleaved, layout)
    (x64_grad,) = torch.autograd.grad(y64, [x64], upstream.cpu().double())
    assert y.dtype == dtype and y.is_contiguous()
    leaf = x.cpu().detach().requires_grad_()
    stock = expected(leaf, (cos, sin), positions, interleaved, layout)
    (stock_grad,) = torch.autograd.grad(stock, leaf, upstream.cpu())
    assert_close(y.cpu(), y64, dtype, sums=2, stock=stock)
    assert_close(x_grad.cpu(), x64_grad, dtype, sums=2, stock=stock_grad, what="x_grad")


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=["i64", "i32"])
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
def test_positions(layout, index, device):
    batch, seq = 3, 5
    x = by_layout(randn(batch, seq, 2, 16, dtype=torch.float32, device=device), layout)
    cos, sin = tables(40, 8, device)
    rows = torch.randint(0, 40, (batch, seq))
    given = rows.flatten() if layout == "thd" else rows
    y = ops.rotary(x, cos, sin, given.to(device, index), layout=layout)
    (x64,) = wide(x)
    assert_close(y.cpu(), expected(x64, (cos, sin), rows, False, layout), sums=2)
    if layout != "thd":
        shared = rows[0].to(device, index)
        one_row = ops.rotary(x, cos, sin, shared[None], layout=layout)
        assert torch.equal(ops.rotary(x, cos, sin, shared, layout=layout), one_row)
        repeated = shared.expand(batch, seq)
        assert torch.equal(ops.rotary(x, cos, sin, repeated, layout=layout), one_row)


def test_positions_restart_at_each_boundary(device):
    lengths = [3, 0, 5, 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    x = randn(11, 2, 8, dtype=torch.float32, device=device)  # two tokens beyond the last boundary
    cos, sin = tables(5, 8, device)
    y = ops.rotary(x, cos, sin, layout="thd", cu_seqlens=cu_seqlens.to(device))
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    assert torch.equal(y[:9], ops.rotary(x[:9], cos, sin, positions, layout="thd"))
    assert torch.equal(y[9:], x[9:])


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [([0, 3, 2, 4], "not 2 at 2"), ([0, 5], "not 5 at 1"), ([-1, 4], "not -1 at 0")],
)
def test_boundaries_that_do_not_rise(boundaries, message, device):
    if device == "cuda":
        pytest.skip("on CUDA nothing reads the boundaries back")
    cos, sin = tables(8, 8, device)
    x, cu_seqlens = torch.zeros(4, 2, 8), torch.tensor(boundaries)
    expected = f"rotary: cu_seqlens: expected rising boundaries from 0 to 4, {message}"
    with pytest.raises(RuntimeError, match=expected):
        ops.rotary(x, cos, sin, layout="thd", cu_seqlens=cu_seqlens)


def packed_qkv(device, dtype=torch.float32, layout="bshd"):
    q_heads, kv_heads, head_dim = 6, 2, 16
    qkv = randn(2, 5, kv_heads * (3 + 2) * head_dim, dtype=dtype, device=device)
    return by_layout(qkv, layout), q_heads, kv_heads, head_dim


def qkv_cases(test):
    """Every pairing, dtype and layout of a packed qkv."""
    pairs = {"halves": False, "neighbours": True}
    test = pytest.mark.parametrize("interleaved", pairs.values(), ids=pairs)(test)
    test = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)(test)
    return pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])(test)


def qkv_case(layout, dtype, interleaved, device):
    """(qkv, heads, kv_heads, head_dim), the tables, and the options."""
    cu_seqlens = boundaries(2, 5, device) if layout == "thd" else None
    options = {"interleaved": interleaved, "layout": layout, "cu_seqlens": cu_seqlens}
    return packed_qkv(device, dtype, layout), tables(5, 12, device), options


@qkv_cases
def test_qkv_turns_q_and_k_and_copies_v(layout, dtype, interleaved, device):
    case, (cos, sin), options = qkv_case(layout, dtype, interleaved, device)
    qkv, heads, kv_heads, head_dim = case

    def packed(qkv):
        return ops.qkv_rotary(qkv, cos, sin, heads, kv_heads, **options)

    def by_parts(qkv):
        groups = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, head_dim))
        q_and_k = groups[..., :-1, :].flatten(-3, -2)
        turned = ops.rotary(q_and_k, cos, sin, **options).view_as(groups[..., :-1, :])
        return torch.cat([turned, groups[..., -1:, :]], -2).flatten(-3)

    (y,), (grad,), upstream = contract.gradients(packed, [qkv])
    (parts,), (parts_grad,), _ = contract.gradients(by_parts, [qkv], upstream)
    assert torch.equal(y, parts) and torch.equal(grad, parts_grad)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided_inputs_have_the_bits_of_contiguous_ones(dtype, device):
    cos, sin = tables(9, 32, device)
    qkv = randn(2, 9, 6, 64, dtype=dtype, device=device)
    unaligned = strided(qkv)
    transposed = qkv.transpose(-1, -2).contiguous().transpose(-1, -2)  # head_dim apart
    for x in (
        qkv[:, :, 1:3],
        unaligned,
        transposed,
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        for interleaved in (False, True):
            y = ops.rotary(x, cos, sin, interleaved=interleaved)
            assert torch.equal(
                y,
                ops.rotary(
                    x.clone(memory_format=torch.contiguous_format),
                    cos,
                    sin,
                    interleaved=interleaved,
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(dtype, device):
    x = randn(4, 9, 3, 64, dtype=dtype, device=device)
    cos, sin = tables(9, 48, device)
    y = ops.rotary(x, cos, sin)
    for row in range(4):
        assert torch.equal(y[row : row + 1], ops.rotary(x[row : row + 1], cos, sin))
    for place in range(9):
        one, position = slice(place, place + 1), torch.tensor([place], device=device)
        assert torch.equal(y[:, one], ops.rotary(x[:, one].contiguous(), cos, sin, position))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_bits(dtype, device):
    cos, sin = tables(64, 64, device)
    x = randn(8, 64, 4, 64, dtype=dtype, device=device)
    contract.same_bits(lambda x: ops.rotary(x, cos, sin), [x])
    contract.gradient_ignores_strides_and_neighbours(lambda x: ops.rotary(x, cos, sin), [x])


def test_does_not_return_an_alias(device):
    cos, sin = tables(4, 0, device)
    x = randn(1, 4, 2, 8, dtype=torch.float32, device=device)
    y = ops.rotary(x, cos, sin)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


def test_keeps_only_the_tables(device):
    cos, sin = tables(64, 64, device)
    x = randn(1, 64, 4, 64, dtype=torch.float32, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rotary(x, cos, sin)
    assert {tensor.data_ptr() for tensor in kept} <= {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("bad", [-1, 9], ids=["negative", "beyond"])
def test_position_outside_the_tables(bad, device):
    x = randn(1, 4, 2, 8, dtype=torch.float32, device=device)
    cos, sin = tables(9, 8, device)
    positions = torch.tensor([0, bad, 2, 8], device=device)
    if device == "cpu":
        message = f"rotary: positions: expected positions from 0 to 8, not {bad}"
        with pytest.raises(RuntimeError, match=message):
            ops.rotary(x, cos, sin, positions)
        return
    y = ops.rotary(x, cos, sin, positions)
    assert y[:, 1].isnan().all() and not y[:, [0, 2, 3]].isnan().any()


def test_sequence_longer_than_the_tables(device):
    x = randn(8, 2, 8, dtype=torch.float32, device=device)
    cos, sin = tables(5, 8, device)
    cu_seqlens = torch.tensor([0, 2, 8], device=device)
    if device == "cpu":
        message = "rotary: cu_seqlens: expected positions from 0 to 4, not 5"
        with pytest.raises(RuntimeError, match=message):
            ops.rotary(x, cos, sin, layout="thd", cu_seqlens=cu_seqlens)
        return
    y = ops.rotary(x, cos, sin, layout="thd", cu_seqlens=cu_seqlens)
    assert y[7:].isnan().all() and not y[:7].isnan().any()


BAD = {
    "layout": (dict(layout="hsbd"), "rotary: layout: expected bshd, sbhd or thd, not hsbd"),
    "rank": (
        dict(layout="thd", positions=[0]),
        "rotary: x: expected a rank of 3 with layout thd, not 4",
    ),
    "no boundaries": (
        dict(layout="thd"),
        "rotary: cu_seqlens: expected cu_seqlens or positions with layout thd, not neither",
    ),
    "boundaries": (
        dict(cu_seqlens=[0, 4]),
        "rotary: cu_seqlens: expected none with layout bshd, only thd has boundaries",
    ),
    "positions' shape": (
        dict(positions=[0, 1]),
        r"rotary: positions: expected \[4\] or \[2, 4\], not \[2\]",
    ),
    "positions' dtype": (
        dict(positions=[0.0, 1.0, 2.0, 3.0]),
        "rotary: positions: expected int64 or int32, not float32",
    ),
    "wide table": (
        dict(table=(4, 10)),
        "rotary: cos: expected at most 4 columns for a head_dim of 8, not 5",
    ),
    "short table": (dict(table=(3, 8)), "rotary: cos: expected at least 4 positions, not 3"),
    "x's dtype": (
        dict(dtype=torch.int32),
        "rotary: x: expected a floating dtype, not Int",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, device):
    options, message = BAD[name]
    options = dict(options)
    cos, sin = tables(*options.pop("table", (4, 8)), device)
    x = torch.zeros(2, 4, 2, 8, dtype=options.pop("dtype", torch.float32), device=device)
    for key in ("positions", "cu_seqlens"):
        if key in options:
            options[key] = torch.tensor(options[key], device=device)
    with pytest.raises(RuntimeError, match=message):
        ops.rotary(x, cos, sin, **options)


def test_bad_tables(device):
    x = torch.zeros(2, 4, 2, 8, device=device)
    cos, sin = tables(4, 8, device)
    with pytest.raises(RuntimeError, match=r"rotary: cos: expected .* float32, not .* bfloat16"):
        ops.rotary(x, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(RuntimeError, match="rotary: sin: expected the shape of cos"):
        ops.rotary(x, cos, sin[:3].contiguous())
    with pytest.raises(RuntimeError, match="rotary: cos: expected a table that needs no gradient"):
        ops.rotary(x, cos.requires_grad_(), sin)


def test_bad_packing(device):
    cos, sin = tables(4, 8, device)
    qkv = torch.zeros(2, 4, 50, device=device)
    with pytest.raises(RuntimeError, match="qkv_rotary: kv_heads: expected a divisor of heads, 3"):
        ops.qkv_rotary(qkv, cos, sin, 3, 2)
    with pytest.raises(RuntimeError, match="qkv_rotary: qkv: expected a last axis of 8 heads"):
        ops.qkv_rotary(qkv, cos, sin, 4, 2)
    with pytest.raises(
        RuntimeError, match="qkv_rotary: qkv: expected a rank of 3 with layout bshd"
    ):
        ops.qkv_rotary(qkv[0], cos, sin, 4, 2)


def test_opcheck(device):
    cos, sin = tables(5, 12, device)
    x = randn(2, 5, 3, 16, dtype=torch.float32, device=device)
    positions = torch.tensor([1, 0, 2, 4, 3], device=device)
    cu_seqlens = boundaries(2, 5, device)
    qkv, heads, kv_heads, _ = packed_qkv(device)
    contract.passes_opcheck(
        torch.ops.redline.rotary.default, (x.requires_grad_(), cos, sin, positions)
    )
    thd = x.detach().flatten(0, 1).requires_grad_()
    contract.passes_opcheck(
        torch.ops.redline.rotary.default,
        (thd, cos, sin, None, True, "thd"),
        {"cu_seqlens": cu_seqlens},
    )
    contract.passes_opcheck(
        torch.ops.redline.qkv_rotary.default, (qkv.requires_grad_(), cos, sin, heads, kv_heads)
    )
    for op in (torch.ops.redline.rotary_forward, torch.ops.redline.rotary_backward):
        args = (x.detach(), cos, sin, positions, None, False, "bshd")
        contract.passes_opcheck(op.default, args, inner=True)
    for op in (torch.ops.redline.qkv_rotary_forward, torch.ops.redline.qkv_rotary_backward):
        args = (qkv.detach(), cos, sin, heads, kv_heads, None, None, False, "bshd")
        contract.passes_opcheck(op.default, args, inner=True)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_gradcheck(interleaved, device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    cos, sin = tables(3, 6)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin, None, interleaved), [x])


def test_compiles_and_exports(device):
    cos, sin = tables(5, 12, device)
    x = randn(2, 5, 3, 16, dtype=torch.float32, device=device)
    qkv, heads, kv_heads, _ = packed_qkv(device)

    def op(x):
        return ops.rotary(x, cos, sin)

    def packed(qkv):
        return ops.qkv_rotary(qkv, cos, sin, heads, kv_heads)

    contract.compiles(op, [x])
    contract.compiles_dynamic(op, [x])
    contract.compiles_dynamic(packed, [qkv])
    contract.exports(op, [x])
    contract.runs_in_inference_mode(op, [x])
    contract.runs_in_inference_mode(packed, [qkv])


def test_autocast_follows_the_tensors(device):
    cos, sin = tables(5, 16, device)
    x = randn(2, 5, 3, 16, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.rotary(x, cos, sin).dtype == torch.float32
        assert ops.rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_refuses_vmap_and_second_derivatives(device):
    cos, sin = tables(5, 16, device)
    x = randn(2, 5, 3, 16, dtype=torch.float32, device=device)
    contract.refuses_vmap(lambda x: ops.rotary(x, cos, sin), [x])
    contract.refuses_double_backward(lambda x: ops.rotary(x, cos, sin).square(), [x])
    contract.refuses_a_tangent_in_backward(lambda x: ops.rotary(x, cos, sin), [x])


def test_graphs_and_streams(device):
    if device != "cuda":
        pytest.skip("CUDA graphs and streams")
    cos, sin = tables(64, 64, device)
    x = randn(8, 64, 4, 64, dtype=torch.bfloat16, device=device)
    contract.captures(lambda x: ops.rotary(x, cos, sin), [x])
    contract.agrees_on_side_stream(lambda x: ops.rotary(x, cos, sin), [x])
