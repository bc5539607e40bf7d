# Over budget: parameters: the router takes as many.
"""The router and the products of experts, against loops in float64, in both directions."""

import re

import pytest
import torch

import reference
from cases import DEVICES, randn, wide
from megatron_config import configuration, on
from redline.extensions import transformer_engine as te
from tolerance import assert_close

TOKENS, EXPERTS = 11, 8

devices = pytest.mark.parametrize("device", DEVICES)
scores = pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])


def route(
    logits, topk=2, pre=False, groups=None, limit=None, scale=None, score="softmax", bias=None
):
    return te.fused_topk_with_score_function(logits, topk, pre, groups, limit, scale, score, bias)


def score_of(row, score):
    if score == "softmax":
        return row.softmax(-1)
    return row.sigmoid() if score == "sigmoid" else torch.log1p(row.exp()).sqrt()


def chosen(selection, topk, groups, limit):
    """The experts of the topk largest, of those in the best groups."""
    experts = range(len(selection))
    if groups:
        size = len(selection) // groups
        blocks = [list(experts)[group * size : (group + 1) * size] for group in range(groups)]
        per_group = topk // limit

        def worth(block):
            return sum(sorted(selection[expert] for expert in block)[-per_group:])

        experts = [e for block in sorted(blocks, key=worth)[-limit:] for e in block]
    return sorted(experts, key=lambda expert: -selection[expert])[:topk]


def by_loop(logits, topk, pre, groups, limit, scale, score, bias):
    probs = []
    for row in logits:
        post = score == "softmax" and not pre
        values = row if post else score_of(row, score)
        selection = values if bias is None else values + bias
        best = chosen(selection.tolist(), topk, groups, limit)
        own = values[best]
        if post:
            own = own.softmax(-1)
        elif score != "softmax" and topk > 1:
            own = own / own.sum()
        full = torch.zeros(EXPERTS, dtype=row.dtype)
        probs.append(full.index_put((torch.tensor(best),), own * (scale or 1.0)))
    return torch.stack(probs)


@devices
@scores
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize(("topk", "groups", "limit"), [(1, None, None), (3, None, None), (4, 4, 2)])
def test_router(score, pre, topk, groups, limit, device):
    logits = randn(TOKENS, EXPERTS, dtype=torch.float32, device=device).requires_grad_()
    bias, scale = None, 2.5 if topk > 1 else None
    if score != "softmax":
        bias = torch.randn(EXPERTS) * 0.3
    given = (topk, pre, groups, limit, scale, score)
    probs, routing_map = route(logits, *given, None if bias is None else bias.to(device))
    (logits64,) = wide(logits)
    expected = by_loop(logits64, *given, None if bias is None else bias.double())
    assert routing_map.dtype == torch.bool
    assert torch.equal(routing_map.cpu(), expected.detach() != 0)
    assert_close(probs.cpu(), expected, roundings=16)
    upstream = torch.randn_like(probs)
    (grad,) = torch.autograd.grad(probs, logits, upstream)
    (grad64,) = torch.autograd.grad(expected, logits64, upstream.cpu().double())
    assert_close(grad.cpu(), grad64, roundings=32)


def test_router_keeps_the_logits_dtype_and_breaks_ties_by_the_lower_expert():
    probs, routing_map = route(torch.zeros(3, EXPERTS, dtype=torch.bfloat16))
    assert probs.dtype == torch.bfloat16
    assert routing_map[:, :2].all() and not routing_map[:, 2:].any()


@devices
@scores
def test_scores_for_the_auxiliary_loss(score, device):
    logits = randn(TOKENS, EXPERTS, dtype=torch.bfloat16, device=device).requires_grad_()
    routing_map, values = te.fused_compute_score_for_moe_aux_loss(logits, 2, score)
    (logits64,) = wide(logits)
    expected = torch.stack([score_of(row, score) for row in logits64])
    expected = expected / expected.sum(-1, keepdim=True)
    assert values.dtype == torch.float32
    assert_close(values.cpu(), expected, roundings=16)
    best = expected.topk(2).indices
    assert torch.equal(routing_map.cpu(), torch.zeros(TOKENS, EXPERTS).scatter(1, best, 1).bool())
    upstream = torch.randn_like(values)
    (grad,) = torch.autograd.grad(values, logits, upstream)
    (grad64,) = torch.autograd.grad(expected, logits64, upstream.cpu().double())
    assert_close(grad.cpu(), grad64, torch.bfloat16)


@devices
@pytest.mark.parametrize("total", ["number", "tensor"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_auxiliary_loss(total, sequences, device):
    columns, topk, coefficient = sequences * EXPERTS, 2, 0.01
    probs = randn(TOKENS, columns, dtype=torch.float32, device=device).requires_grad_()
    counts = torch.randint(1, 9, (columns,)).to(device)
    tokens = TOKENS if total == "number" else torch.tensor(TOKENS, device=device)
    loss = te.fused_moe_aux_loss(probs, counts, tokens, EXPERTS, topk, coefficient)
    (probs64,) = wide(probs)
    expected = coefficient * EXPERTS / (topk * TOKENS**2) * (probs64.sum(0) * counts.cpu()).sum()
    assert loss.shape == () and loss.dtype == torch.float32
    assert_close(loss.cpu(), expected, roundings=16, sums=64)
    (grad,) = torch.autograd.grad(loss, probs)
    assert_close(grad.cpu(), torch.autograd.grad(expected, probs64)[0], roundings=4)


# --- the experts' products ------------------------------------------------------------------------

IN, OUT, GROUPS = 6, 4, 3
SPLITS = [4, 0, 3]
MODES = {"column": te.TEColumnParallelGroupedLinear, "row": te.TERowParallelGroupedLinear}


def make_grouped(mode="column", config=None, **changes):
    given = {
        "config": config or configuration(),
        "init_method": torch.nn.init.normal_,
        "bias": True,
        "skip_bias_add": False,
        "is_expert": True,
    }
    return MODES[mode](GROUPS, IN, OUT, **(given | changes))


def by_expert(x, weights, biases):
    each = zip(x.split(SPLITS), weights, biases, strict=True)
    return torch.cat([reference.linear(*block) for block in each])


@devices
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tensor", [False, True], ids=["list", "tensor"])
def test_grouped_linear(mode, tensor, device):
    layer = make_grouped(mode, on(device))
    for bias in layer.biases():
        torch.nn.init.normal_(bias)
    x = randn(sum(SPLITS), IN, dtype=torch.float32, device=device).requires_grad_()
    y, biases = layer(x, torch.tensor(SPLITS, device=device) if tensor else SPLITS)
    assert biases is None
    leaves = [x, *layer.weights(), *layer.biases()]
    truth = wide(*leaves)
    y64 = by_expert(truth[0], truth[1 : 1 + GROUPS], truth[1 + GROUPS :])
    assert_close(y.cpu(), y64, roundings=2, sums=8)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, upstream)
    grads64 = torch.autograd.grad(y64, truth, upstream.cpu().double())
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert_close(grad.cpu(), grad64, roundings=2, sums=8)
    assert not grads[2].any()  # the expert without rows


def test_grouped_linear_returns_the_biases_unadded():
    layer = make_grouped(skip_bias_add=True)
    for bias in layer.biases():
        torch.nn.init.ones_(bias)
    x = torch.randn(sum(SPLITS), IN)
    y, biases = layer(x, SPLITS)
    assert all(a is b for a, b in zip(biases, layer.biases(), strict=True))
    assert_close(
        y, by_expert(x.double(), [w.double() for w in layer.weights()], [None] * 3), sums=8
    )


def test_grouped_linear_marks_its_parameters():
    column, row = make_grouped(), make_grouped("row")
    for index in range(GROUPS):
        weight, bias = getattr(column, f"weight{index}"), getattr(column, f"bias{index}")
        assert (weight.tensor_model_parallel, weight.partition_dim, weight.allreduce) == (
            True,
            0,
            True,
        )
        assert (bias.tensor_model_parallel, bias.partition_dim) == (True, 0)
        assert getattr(row, f"weight{index}").partition_dim == 1
        assert not getattr(row, f"bias{index}").tensor_model_parallel
    assert column.rng_tracker_name == "expert-parallel-rng"


@pytest.mark.parametrize(
    "delay", [None, "delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"]
)
def test_grouped_linear_accumulates_main_grad(delay):
    changes = {"gradient_accumulation_fusion": True} | ({delay: True} if delay else {})
    layer, fired = make_grouped(config=configuration(**changes)), []
    for weight in layer.weights():
        weight.main_grad = torch.full_like(weight, float("nan"))
        weight.grad_added_to_main_grad = False
    layer.register_wgrad_accumulation_and_reduce_hooks(lambda: fired.append(1))
    x = torch.randn(sum(SPLITS), IN)
    for _ in range(2):
        layer(x, SPLITS)[0].sum().backward()
        layer.backward_dw()
    assert len(fired) == (2 if delay else 0)
    weights = [weight.detach().double().requires_grad_() for weight in layer.weights()]
    stock = 2 * by_expert(x.double(), weights, [None] * GROUPS).sum()
    for weight, truth in zip(layer.weights(), torch.autograd.grad(stock, weights), strict=True):
        assert weight.grad_added_to_main_grad
        assert_close(weight.main_grad, truth, sums=8)


@pytest.mark.parametrize("form", ["indexed", "stacked", "concatenated", "distributed"])
def test_grouped_linear_loads_every_form(form):
    source, layer = make_grouped(), make_grouped()
    state = source.state_dict()
    assert list(state) == [f"{n}{i}" for i in range(3) for n in ("weight", "bias")] + [
        "_extra_state"
    ]
    if form == "distributed":
        state |= {f"_extra_state{index}": torch.empty(0, dtype=torch.uint8) for index in (1, 2)}
    if form in ("stacked", "concatenated"):
        join = torch.stack if form == "stacked" else torch.cat
        state = {"weight": join(source.weights()), "bias": join(source.biases())}
    layer.load_state_dict(state)
    for ours, theirs in zip(layer.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: make_grouped(is_expert=False),
            ValueError,
            "TEColumnParallelGroupedLinear: is_expert: expected True, not False",
        ),
        (
            lambda: make_grouped(config=configuration(expert_model_parallel_size=2)),
            NotImplementedError,
            "TEColumnParallelGroupedLinear: expert_model_parallel_size: expected 1, not 2; "
            "more ranks are not built; one rank works",
        ),
        (
            lambda: make_grouped()(torch.ones(7, IN), [4, 3]),
            ValueError,
            "TEColumnParallelGroupedLinear: splits: expected 3 counts of 7 rows, not [4, 3]",
        ),
        (
            lambda: make_grouped().load_state_dict({"weight": torch.ones(4, OUT, IN)}),
            RuntimeError,
            "TEColumnParallelGroupedLinear: weight: expected a multiple of 3 rows, not [4, 4, 6]",
        ),
        (
            lambda: route(torch.zeros(2, EXPERTS).double()),
            ValueError,
            "fused_topk_with_score_function: logits: expected float32, bfloat16 or float16, "
            "not float64",
        ),
        (
            lambda: route(torch.zeros(2, EXPERTS), score="tanh"),
            ValueError,
            "fused_topk_with_score_function: score_function: expected softmax or sigmoid or "
            "sqrtsoftplus, not tanh",
        ),
        (
            lambda: route(torch.zeros(2, EXPERTS), bias=torch.zeros(EXPERTS)),
            ValueError,
            "fused_topk_with_score_function: expert_bias: expected sigmoid or sqrtsoftplus, "
            "not softmax",
        ),
        (
            lambda: te.fused_compute_score_for_moe_aux_loss(
                torch.zeros(2, 8), 2, "softmax", routing_map_format="bitmap_u8"
            ),
            NotImplementedError,
            "fused_compute_score_for_moe_aux_loss: routing_map_format: expected bytemap, "
            "not bitmap_u8; bytemap works",
        ),
        (
            lambda: te.fused_moe_aux_loss(torch.zeros(2, 9), torch.zeros(9), 2, 8, 2, 1.0),
            ValueError,
            "fused_moe_aux_loss: probs: expected a multiple of 8 columns, not 9",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()
