"""qkv_rotary_split: the bits of qkv_rotary, apart, and what the laws ask."""

import pytest
import torch

import contract
from cases import DEVICES, randn, strided
from redline import ops
from test_rotary import packed_qkv, qkv_case, qkv_cases, tables

pytestmark = pytest.mark.parametrize("device", DEVICES)


@qkv_cases
def test_qkv_split_has_the_bits_of_the_packed_one(layout, dtype, interleaved, device):
    case, (cos, sin), options = qkv_case(layout, dtype, interleaved, device)
    qkv, heads, kv_heads, head_dim = case

    def split(qkv):
        return ops.qkv_rotary_split(qkv, cos, sin, heads, kv_heads, **options)

    def packed(qkv):
        y = ops.qkv_rotary(qkv, cos, sin, heads, kv_heads, **options)
        groups = y.unflatten(-1, (kv_heads, heads // kv_heads + 2, head_dim))
        q, k, v = groups.split([heads // kv_heads, 1, 1], -2)
        return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)

    ours, (grad,), upstream = contract.gradients(split, [qkv])
    theirs, (packed_grad,), _ = contract.gradients(packed, [qkv], upstream)
    contract.equal_bits([*ours, grad], [*theirs, packed_grad])
    assert all(part.is_contiguous() for part in ours)
    assert len({part.untyped_storage().data_ptr() for part in ours}) == 3


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 3, 4, 4, 6), (3, 0, 2, 1, 8)], ids=str)
def test_qkv_split_of_odd_sizes(shape, device):
    batch, seq, heads, kv_heads, head_dim = shape
    cos, sin = tables(max(seq, 1), 2, device)
    wide = (heads + 2 * kv_heads) * head_dim
    qkv = strided(randn(batch, seq, wide, dtype=torch.float32, device=device))
    packed = ops.qkv_rotary(qkv, cos, sin, heads, kv_heads)
    leaf = qkv.detach().requires_grad_()
    parts = ops.qkv_rotary_split(leaf, cos, sin, heads, kv_heads)
    group = heads // kv_heads
    joined = torch.cat([part.unflatten(2, (kv_heads, -1)) for part in parts], 3)
    assert joined.shape[3] == group + 2 and torch.equal(joined.reshape(packed.shape), packed)
    # Gradients as attention gives them: heads before tokens, and of k's none.
    upstream = [torch.randn_like(p).transpose(1, 2).contiguous().transpose(1, 2) for p in parts]
    (grad,) = torch.autograd.grad(parts[::2], [leaf], upstream[::2], retain_graph=True)
    upstream[1].zero_()
    (same,) = torch.autograd.grad(parts, [leaf], upstream)
    assert torch.equal(grad, same) and grad.isfinite().all()


def test_bad_arguments(device):
    cos, sin = tables(4, 8, device)
    qkv = torch.zeros(2, 4, 50, device=device)
    with pytest.raises(RuntimeError, match="qkv_rotary_split: kv_heads: expected a divisor of"):
        ops.qkv_rotary_split(qkv, cos, sin, 3, 2)
    with pytest.raises(RuntimeError, match="qkv_rotary_split: qkv: expected a last axis of 8 he"):
        ops.qkv_rotary_split(qkv, cos, sin, 4, 2)
    with pytest.raises(RuntimeError, match="qkv_rotary_split: qkv: expected a rank of 3 with lay"):
        ops.qkv_rotary_split(qkv[0], cos, sin, 4, 2)
    q_grad, k_grad = torch.zeros(2, 4, 4, 8, device=device), torch.zeros(2, 4, 2, 8, device=device)
    backward = torch.ops.redline.qkv_rotary_split_backward
    rest = (cos, sin, 4, 2, None, None, False, "bshd")
    message = r"qkv_rotary_split: v_grad: expected \[2, 4, 2, 8\] float32, not .*\[2, 4, 4, 8\]"
    with pytest.raises(RuntimeError, match=message):
        backward(q_grad, k_grad, q_grad, *rest)
    message = "qkv_rotary_split: k_grad: expected a rank of 4 with layout bshd, not 3"
    with pytest.raises(RuntimeError, match=message):
        backward(q_grad, k_grad[0], k_grad, *rest)


def test_opcheck(device):
    cos, sin = tables(5, 12, device)
    qkv, heads, kv_heads, _ = packed_qkv(device)
    qkv.requires_grad_()
    split = (cos, sin, heads, kv_heads)
    contract.passes_opcheck(torch.ops.redline.qkv_rotary_split.default, (qkv, *split))
    parts = ops.qkv_rotary_split(qkv.detach(), *split)
    rest = (*split, None, None, False, "bshd")
    inner = torch.ops.redline.qkv_rotary_split_forward, torch.ops.redline.qkv_rotary_split_backward
    contract.passes_opcheck(inner[0].default, (qkv.detach(), *rest), inner=True)
    contract.passes_opcheck(inner[1].default, (*parts, *rest), inner=True)


def test_compiles_and_exports(device):
    cos, sin = tables(5, 12, device)
    qkv, heads, kv_heads, _ = packed_qkv(device)

    def op(qkv):
        return ops.qkv_rotary_split(qkv, cos, sin, heads, kv_heads)

    contract.compiles_dynamic(op, [qkv])
    contract.exports(op, [qkv])
    contract.runs_in_inference_mode(op, [qkv])
    contract.refuses_vmap(op, [qkv])


def test_graphs_and_streams(device):
    if device != "cuda":
        pytest.skip("CUDA graphs and streams")
    cos, sin = tables(64, 64, device)
    qkv = randn(8, 64, 8 * 64, dtype=torch.bfloat16, device=device)
    contract.captures(lambda x: ops.qkv_rotary_split(x, cos, sin, 4, 2)[0], [qkv])
    contract.agrees_on_side_stream(lambda x: ops.qkv_rotary_split(x, cos, sin, 4, 2)[1], [qkv])
