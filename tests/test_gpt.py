"""GPT: its loss, its logits in backward, under torch.compile and autocast."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cases
from layer_cases import FFN, GPTS, HEADS, HIDDEN, agree, seeded_gpt
from redline.dyno.parts import why_no_compiler
from redline.layers import GPT

gpts = pytest.mark.parametrize("name", GPTS)


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


@gpts
def test_gpt_compiles(name, device):
    gpt, tokens = seeded_gpt(GPTS[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    grads = []
    for model in (gpt, compiled):
        gpt.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    agree(*grads)


def test_gpt_compiles_whole_and_again_once_per_dynamic_dim(device):
    """Two batches, then two lengths: no graph break, and one more graph for each, at most."""
    gpt, _ = seeded_gpt(GPTS["GPT"], device)
    counter = CompileCounterWithBackend("aot_eager")

    def graphs_after(*sizes):
        for batch, length in sizes:
            tokens = torch.randint(31, (batch, length + 1), device=device)
            compiled(tokens[:, :-1], tokens[:, 1:]).backward()
        return counter.frame_count

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(gpt, backend=counter)
    first = graphs_after((2, 8))
    batches = graphs_after((3, 8), (5, 8), (4, 8))
    lengths = graphs_after((4, 11), (3, 6), (5, 9))
    assert first == 1 and batches <= 2 and lengths <= batches + 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_gpt_under_inductor(device):
    gpt, tokens = seeded_gpt(GPTS["GPT"], device)
    torch._dynamo.reset()
    if reason := why_no_compiler(torch.device(device)):
        pytest.skip(reason)
    loss = torch.compile(gpt, fullgraph=True)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, gpt(tokens[:, :-1], tokens[:, 1:]))
    assert all(parameter.grad is not None for parameter in gpt.parameters())


@gpts
def test_gpt_loss_is_the_cross_entropy_of_its_logits(name, device):
    gpt, tokens = seeded_gpt(GPTS[name], device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    stock = torch.nn.functional.cross_entropy(gpt(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(gpt(inputs, targets), stock)
    keys = list(gpt.state_dict())
    assert keys[0] == "embedding.weight"
    assert ("head.weight" in keys) != (name == "GPT-tied")
    assert {key.split(".")[0] for key in keys} <= {"embedding", "layers", "final_norm", "head"}


@gpts
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gpt_predicts_the_largest_logits(reduction, name, device):
    gpt, tokens = seeded_gpt(GPTS[name], device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        logits, loss = gpt(inputs), gpt(inputs, targets, reduction=reduction)
        predicted = gpt(inputs, targets, reduction=reduction, return_predictions=True)
    assert torch.equal(predicted[0], loss)
    assert torch.equal(predicted[1], logits.argmax(-1))
    stock = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction
    )
    torch.testing.assert_close(loss.flatten(), stock.reshape(-1))


def test_gpt_trains_beside_its_predictions(device):
    gpt, tokens = seeded_gpt(GPTS["GPT"], device)
    parameters = list(gpt.parameters())
    alone = torch.autograd.grad(gpt(tokens, tokens), parameters)
    loss, predictions = gpt(tokens, tokens, return_predictions=True)
    assert not predictions.requires_grad
    agree(torch.autograd.grad(loss, parameters), alone)


@pytest.mark.parametrize(
    ("fused_loss", "targets", "message"),
    [
        ("none", False, "GPT: targets: expected some beside return_predictions, not None"),
        ("promise", True, "GPT: return_predictions: expected False beside fused_loss='promise'"),
        ("recompute", True, "GPT: return_predictions: .*'recompute', which has no logits"),
    ],
)
def test_gpt_refuses_predictions_without_logits(fused_loss, targets, message):
    gpt, tokens = seeded_gpt(functools.partial(GPTS["GPT"], fused_loss=fused_loss))
    with pytest.raises(RuntimeError, match=message):
        gpt(tokens, tokens if targets else None, return_predictions=True)


@pytest.mark.parametrize("inplace", [True, False])
def test_gpt_writes_its_gradient_over_the_logits(inplace, device):
    make = functools.partial(GPT, 31, HIDDEN, FFN, 1, HEADS, inplace_backward=inplace)
    gpt, tokens = seeded_gpt(make, device)
    loss = gpt(tokens, tokens)
    loss.backward(retain_graph=True)
    if inplace:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()


def test_gpt_leaves_logits_that_a_hook_has_seen(device):
    (gpt, tokens), kept = seeded_gpt(GPTS["GPT"], device), []
    gpt.head.register_forward_hook(lambda module, inputs, output: kept.append(output))
    gpt(tokens, tokens).backward()
    assert torch.equal(kept[0], gpt(tokens))


@gpts
def test_gpt_under_autocast(name, device):
    """bfloat16 products, float32 weights and gradients, and a loss near that of float32."""
    gpt, tokens = seeded_gpt(GPTS[name], device)
    plain = gpt(tokens[:, :-1], tokens[:, 1:]).detach()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gpt(tokens).dtype == torch.bfloat16
        loss = gpt(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32 and loss.item() != plain.item()
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-2, atol=0)
    loss.backward()
    for parameter in gpt.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


fused = pytest.mark.parametrize("mode", ["promise", "recompute"])


def grads_of(gpt, tokens, scale=1.0):
    gpt.zero_grad()
    loss = gpt(tokens[:, :-1], tokens[:, 1:])
    (loss * scale).backward()
    return [loss.detach(), *(p.grad.clone() for p in gpt.parameters())]


@gpts
@fused
def test_gpt_with_a_fused_loss(mode, name, device):
    gpt, tokens = seeded_gpt(GPTS[name], device)
    for scale in (1.0, 0.37):  # the second is not what was promised
        gpt.fused_loss = "none"
        expected = grads_of(gpt, tokens, scale)
        gpt.fused_loss = mode
        for ours, theirs in zip(grads_of(gpt, tokens, scale), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(grads_of(compiled, tokens), grads_of(gpt, tokens), strict=True):
        torch.testing.assert_close(ours, theirs)


@fused
def test_gpt_gives_each_tokens_loss_under_any_gradient(mode, device):
    gpt, tokens = seeded_gpt(GPTS["GPT"], device)
    found = []
    for gpt.fused_loss in ("none", mode):
        gpt.zero_grad()
        losses = gpt(tokens[:, :-1], tokens[:, 1:], reduction="none")
        (
            losses * torch.arange(1.0, losses.numel() + 1, device=device).view_as(losses)
        ).sum().backward()
        found.append([losses.detach(), *(p.grad.clone() for p in gpt.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@fused
def test_gpt_with_a_fused_loss_fills_main_grad(mode, device):
    gpt, tokens = seeded_gpt(functools.partial(GPTS["GPT"], fused_loss=mode), device)
    grads_of(gpt, tokens)
    expected = gpt.head.weight.grad
    gpt.head.set_weight_gradient(accumulate_main_grad=True, delay_weight_grad=False)
    gpt.head.weight.main_grad = torch.zeros_like(gpt.head.weight)
    gpt.zero_grad()
    gpt(tokens[:, :-1], tokens[:, 1:]).backward()
    assert gpt.head.weight.grad is None
    torch.testing.assert_close(gpt.head.weight.main_grad, expected)


@fused
def test_gpt_with_a_fused_loss_refuses_what_its_head_would_do(mode, device):
    gpt, tokens = seeded_gpt(functools.partial(GPTS["GPT"], fused_loss=mode), device)
    for hook in (gpt.head.register_forward_hook, gpt.head.register_forward_pre_hook):
        handle = hook(lambda *given: None)
        with pytest.raises(RuntimeError, match="fused_loss: expected a head without forward hooks"):
            gpt(tokens, tokens)
        gpt(tokens)
        handle.remove()
    gpt.head.set_weight_gradient(accumulate_main_grad=False, delay_weight_grad=True)
    with pytest.raises(RuntimeError, match="expected a head without delay_weight_grad"):
        gpt(tokens, tokens)
    with pytest.raises(ValueError, match="fused_loss: expected none, promise or recompute, not 1"):
        GPTS["GPT"](fused_loss=1)


def test_gpt_loss_with_frozen_parameters():
    gpt, tokens = GPTS["GPT"]().requires_grad_(False), torch.randint(31, (2, 9))
    assert not gpt(tokens, tokens).requires_grad
