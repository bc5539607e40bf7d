"""What backward computes again instead of keeping it: the layers' policies, and torch's by op."""

import functools
import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import cases
from layer_cases import FFN, GPTS, HEADS, HIDDEN, LAYERS, agree, seeded, seeded_gpt
from redline.layers import TransformerLayer

policies = pytest.mark.parametrize("policy", ["selective", "full"])
inner, aten = torch.ops.redline, torch.ops.aten


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


class Count(TorchDispatchMode):
    """How often each op ran."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **kwargs or {})


def grads_of(layer, x, call=None):
    """The output and all gradients; and how often each op ran."""
    torch.manual_seed(3)
    with Count() as count:
        y = (call or layer)(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    return [y.detach(), *grads], count.calls


def products(calls):
    return sum(n for op, n in calls.items() if re.match(r"aten\.(add)?mm\.|redline\.gemm", str(op)))


def attentions(calls):
    """Runs of attention's forward."""
    return sum(n for op, n in calls.items() if "attention" in str(op) and "backward" not in str(op))


@policies
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layer_has_the_gradients_of_none(policy, dropout, device):
    make = functools.partial(TransformerLayer, HIDDEN, FFN, HEADS, 2, dropout=dropout)
    kept, x = seeded(make, device)
    again, _ = seeded(functools.partial(make, recompute=policy), device)
    (ours, more), (theirs, once) = grads_of(again, x), grads_of(kept, x)
    agree(ours, theirs)
    assert products(once) == 12 and attentions(once) == 1
    # "full" runs forward's four products and attention again, "selective" attention alone.
    assert products(more) == (16 if policy == "full" else 12)
    assert attentions(more) == 2
    with torch.no_grad(), Count() as count:
        again(x)
    assert attentions(count.calls) == 1


@policies
@pytest.mark.parametrize("name", GPTS)
def test_gpt_has_the_gradients_of_none(policy, name, device):
    results = []
    for recompute in ("none", policy):
        gpt, tokens = seeded_gpt(functools.partial(GPTS[name], recompute=recompute), device)
        loss = gpt(tokens[:, :-1], tokens[:, 1:])
        results.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()))])
    agree(*results)


@policies
def test_compiles(policy, device):
    gpt, tokens = seeded_gpt(functools.partial(GPTS["GPT"], recompute=policy), device)
    torch._dynamo.reset()
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (compiled, gpt)]
    agree(*(torch.autograd.grad(loss, list(gpt.parameters())) for loss in losses))


@policies
def test_main_grad_is_added_to_once(policy, device):
    make = functools.partial(TransformerLayer, HIDDEN, FFN, HEADS, recompute=policy)
    layer, x = seeded(make, device)
    (_, *grads), _ = grads_of(layer, x)
    proj = layer.self_attention.proj
    proj.set_weight_gradient(accumulate_main_grad=True, delay_weight_grad=False)
    proj.weight.main_grad = torch.zeros_like(proj.weight)
    layer(x).sum().backward()
    expected = dict(zip(["x", *dict(layer.named_parameters())], grads, strict=True))
    agree([proj.weight.main_grad], [expected["self_attention.proj.weight"]])


def test_refuses_another_word():
    message = "TransformerLayer: recompute: expected none selective full, not some"
    with pytest.raises(ValueError, match=message):
        TransformerLayer(HIDDEN, FFN, HEADS, recompute="some")


SAVED = {  # which ops' results stay, by layer: the others of forward run twice
    "LayerNormLinear": [inner.layer_norm_forward],
    "LayerNormMLP": [inner.gated_activation_forward, aten.mm, inner.gemm],
    "LayerNormMLP-gelu": [inner.activation_forward],
    "TransformerLayer": [aten.mm, inner.gemm, inner.qkv_rotary_split_forward],
}


@pytest.mark.parametrize("name", SAVED)
def test_torchs_policy_by_op(name, device):
    """create_selective_checkpoint_contexts sees the ops inside of a fused node."""
    layer, x = seeded(LAYERS[name], device)
    saved = [op.default for op in SAVED[name]]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    theirs, once = grads_of(layer, x)
    ours, more = grads_of(
        layer, x, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    )
    agree(ours, theirs)
    assert any(once[op] for op in saved) and all(more[op] == once[op] for op in saved)
    again = [str(op) for op in once if more[op] > once[op]]
    assert any(op.startswith(("redline.", "aten.mm", "aten.addmm")) for op in again), again
