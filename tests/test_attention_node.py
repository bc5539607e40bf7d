"""attention where torch's fused kernels serve it: one node of autograd, and where it is none."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cases import DEVICES, randn
from redline import ops

NAME = "PlainFunction"


def leaves(device="cpu", dtype=torch.bfloat16, heads=(4, 2, 2), head_dim=64):
    drawn = (
        randn(2, 16, count, head_dim, dtype=dtype, device=device, seed=i)
        for i, count in enumerate(heads)
    )
    return [tensor.requires_grad_() for tensor in drawn]


def stock(q, k, v, **options):
    """What the node stands for."""
    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*heads, **options).transpose(1, 2).contiguous()


def nodes_between(out, inputs):
    """Names of the nodes that backward runs before it reaches the inputs."""
    ends = {torch.autograd.graph.get_gradient_edge(tensor).node for tensor in inputs}
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in ends or node in found:
            continue
        found.add(node)
        waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2)], ids=str)
def test_one_node_and_stocks_bits(heads, causal, device):
    """On CUDA forward alone: torch's backward is not repeatable there."""
    inputs = leaves(device, heads=heads)
    out = ops.attention(*inputs, causal=causal)
    (name,) = nodes_between(out, inputs)
    assert NAME in name
    theirs = stock(*inputs, is_causal=causal, enable_gqa=heads[0] != heads[1])
    assert torch.equal(out, theirs) and out.stride() == theirs.stride()
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    expected = torch.autograd.grad(theirs, inputs, upstream)
    for ours, stocks in zip(grads, expected, strict=True):
        assert ours.stride() == stocks.stride()
        assert device == "cuda" or torch.equal(ours, stocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some(wanted, device):
    inputs = leaves(device)
    given = [x if i in wanted else x.detach() for i, x in enumerate(inputs)]
    asked = [inputs[i] for i in wanted]
    upstream = torch.randn_like(inputs[0])
    grads = torch.autograd.grad(ops.attention(*given, causal=True), asked, upstream)
    expected = torch.autograd.grad(ops.attention(*inputs, causal=True), inputs, upstream)
    for i, grad in zip(wanted, grads, strict=True):
        assert grad.shape == inputs[i].shape
        assert device == "cuda" or torch.equal(grad, expected[i])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_is_checked(device):
    inputs = leaves(device)
    for written in range(4):
        given = [x * 1 for x in inputs]
        out = ops.attention(*given, causal=True)
        with torch.no_grad():
            [*given, out][written].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    out = ops.attention(*inputs, causal=True)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out.sum(), inputs)
    assert device == "cuda" or all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_bytes_are_kept_as_by_torchs_ops(device):
    def kept(function, **options):
        storages, inputs = {}, leaves(device)

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(*inputs, **options)
        out.sum().backward()
        return sum(storages.values())

    assert kept(ops.attention, causal=True) == kept(stock, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("device", DEVICES)
def test_modes_see_torchs_ops(device):
    inputs = leaves(device)
    plain = ops.attention(*inputs, causal=True)
    with Watching() as ours:
        out = ops.attention(*inputs, causal=True)
    with Watching() as theirs:
        stock(*inputs, is_causal=True, enable_gqa=True)
    assert ours.names[: len(theirs.names)] == theirs.names
    assert torch.equal(out, plain) and len(nodes_between(out, inputs)) > 1
    with Watching() as backward:  # of a node that was made outside
        torch.autograd.grad(plain.sum(), inputs)
    assert any("_attention" in name and "_backward" in name for name in backward.names)
    assert any("transpose" in name for name in backward.names)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_fused_kernel_it_is_torchs_composition(device):
    inputs = leaves(device, dtype=torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        out = ops.attention(*inputs, causal=True)
        q, k, v = inputs
        if device == "cuda":  # float32: a key's head is repeated for each of its queries'
            k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], 2) for tensor in (k, v))
        theirs = stock(q, k, v, is_causal=True, enable_gqa=device == "cpu")
    assert torch.equal(out, theirs)
    assert not any(NAME in name for name in nodes_between(out, inputs))
    (grad,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    assert torch.autograd.grad(grad.sum(), inputs[1])[0].any()


@pytest.mark.parametrize("device", DEVICES[1:])
def test_heads_that_torch_pads_are_torchs_composition(device):
    inputs = leaves(device, head_dim=20)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = ops.attention(*inputs, causal=True)
        theirs = stock(*inputs, is_causal=True, enable_gqa=True)
    assert torch.equal(out, theirs)
    assert not any(NAME in name for name in nodes_between(out, inputs))


def test_unasked_outputs_are_none():
    _, log_sum_exp, max_logit = torch.ops.redline.attention(*leaves(), causal=True)
    assert log_sum_exp is None and max_logit is None


def test_forward_mode_is_torchs_composition():
    inputs = [x.detach() for x in leaves(dtype=torch.float32)]
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = [torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        ours = torch.autograd.forward_ad.unpack_dual(ops.attention(*duals, causal=True))
        theirs = torch.autograd.forward_ad.unpack_dual(
            stock(*duals, is_causal=True, enable_gqa=True)
        )
    assert ours.tangent.any() and torch.equal(ours.tangent, theirs.tangent)


def test_a_subclass_and_a_functional_transform_are_torchs_composition():
    class Tagged(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            inner = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, args)
            return function(*inner, **(kwargs or {}))

        @staticmethod
        def wrap(inner):
            made = torch.Tensor._make_wrapper_subclass(Tagged, inner.shape, dtype=inner.dtype)
            made.inner = inner
            return made

    seen = []
    inputs = [x.detach() for x in leaves()]
    plain = ops.attention(*inputs, causal=True)
    assert torch.equal(ops.attention(*map(Tagged.wrap, inputs), causal=True), plain)
    assert seen == ["aten.transpose.int"] * 3
    q, k, v = inputs
    grad = torch.func.grad(lambda x: ops.attention(x, k, v, causal=True).sum())(q)
    q.requires_grad_()
    assert torch.equal(grad, torch.autograd.grad(ops.attention(q, k, v, causal=True).sum(), q)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_an_inference_tensor_is_refused_in_torchs_words(device):
    q, k, v = leaves(device, dtype=torch.float32)
    with torch.inference_mode():
        q = q.detach() * 1
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ops.attention(q, k, v)
    with torch.no_grad():
        assert ops.attention(q, k, v).shape == q.shape
