"""The new address's attention: masks, sinks, windows, packing, dropout, against the formula."""

from types import SimpleNamespace

import pytest
import torch

import reference
from cases import DEVICES, randn, wide
from megatron_config import AttnMaskType, configuration, on
from redline.extensions import transformer_engine as te
from tolerance import assert_close

SEQUENCE, BATCH, HEADS, GROUPS, DIM = 9, 2, 4, 2, 8

devices = pytest.mark.parametrize("device", DEVICES)


def make_attention(config=None, mask=AttnMaskType.causal, layer_number=1, **changes):
    config = config or configuration()
    return te.TEDotProductAttention(config, layer_number, mask, "self", **changes)


def inputs(device="cpu", queries=SEQUENCE, v_dim=DIM):
    shapes = ((queries, HEADS, DIM), (SEQUENCE, GROUPS, DIM), (SEQUENCE, GROUPS, v_dim))
    return [
        randn(s, BATCH, *rest, dtype=torch.float32, device=device, seed=seed).requires_grad_()
        for seed, (s, *rest) in enumerate(shapes)
    ]


def excluded_by(before=-1, after=0, queries=SEQUENCE, keys=SEQUENCE):
    """bool [queries, keys] of a window about the diagonal from the lower right corner."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    excluded = torch.zeros_like(distance, dtype=torch.bool)
    excluded = excluded | (distance > after) if after >= 0 else excluded
    return excluded | (distance < -before) if before >= 0 else excluded


def check(y, qkv, excluded, sink=None, **options):
    """Output and gradients against float64, sequence first."""
    q64, k64, v64, sink64 = wide(*qkv, sink)
    y64 = reference.attention(
        [x.transpose(0, 1) for x in (q64, k64, v64)], excluded, sink=sink64, **options
    )
    y64 = y64.transpose(0, 1).flatten(2)
    assert_close(y.cpu(), y64, roundings=16, sums=32)
    upstream = torch.randn_like(y)
    given = [x for x in (*qkv, sink) if x is not None]
    truth = [x for x in (q64, k64, v64, sink64) if x is not None]
    grads = torch.autograd.grad(y, given, upstream)
    grads64 = torch.autograd.grad(y64, truth, upstream.cpu().double())
    for name, grad, grad64 in zip(("q", "k", "v", "sink"), grads, grads64, strict=False):
        assert_close(grad.cpu(), grad64, roundings=32, sums=64, what=f"{name}_grad")


@devices
@pytest.mark.parametrize("v_dim", [DIM, 4], ids=["same", "narrow_v"])
def test_causal(v_dim, device):
    q, k, v = inputs(device, v_dim=v_dim)
    layer = make_attention(on(device), k_channels=DIM, v_channels=v_dim)
    y = layer(q, k, v, None, AttnMaskType.causal)
    assert y.shape == (SEQUENCE, BATCH, HEADS * v_dim)
    check(y, (q, k, v), excluded_by())


@devices
def test_learnable_sink(device):
    q, k, v = inputs(device)
    layer = make_attention(on(device, softmax_type="learnable", num_attention_heads=HEADS))
    sink = layer.softmax_offset
    assert sink.dtype == torch.float32 and not sink.any()
    assert (sink.tensor_model_parallel, sink.partition_dim) == (True, 0)
    torch.nn.init.normal_(sink)
    check(layer(q, k, v, None, AttnMaskType.causal), (q, k, v), excluded_by(), sink)


@devices
def test_off_by_one_is_a_sink_of_zero(device):
    q, k, v = inputs(device)
    y = make_attention(on(device, softmax_type="off-by-one"))(q, k, v, None, AttnMaskType.causal)
    heads = [x.transpose(0, 1) for x in wide(q, k, v)]
    zeros = torch.zeros(HEADS, dtype=torch.float64)
    y64 = reference.attention(heads, excluded_by(), sink=zeros).transpose(0, 1).flatten(2)
    assert_close(y.cpu(), y64, roundings=16, sums=32)


@pytest.mark.parametrize(
    ("skip", "windowed"), [(None, [1, 2, 3, 4]), (2, [1, 3]), ([1, 0, 0, 1], [1, 4])]
)
def test_window_follows_the_layer(skip, windowed):
    config = configuration(window_size=(3, 0), window_attn_skip_freq=skip)
    q, k, v = inputs()
    for number in (1, 2, 3, 4):
        y = make_attention(config, layer_number=number)(q, k, v, None, AttnMaskType.causal)
        check(y, (q, k, v), excluded_by(3 if number in windowed else -1))


def test_one_query_in_a_window_counts_from_the_last_key():
    q, k, v = inputs(queries=1)
    layer = make_attention(configuration(window_size=(3, 0)))
    check(layer(q, k, v, None, AttnMaskType.no_mask), (q, k, v), excluded_by(3, queries=1))


def test_bottom_right_and_scale():
    q, k, v = inputs(queries=5)
    y = make_attention(softmax_scale=0.2)(q, k, v, None, AttnMaskType.causal_bottom_right)
    check(y, (q, k, v), excluded_by(queries=5), scale=0.2)


def packed(lengths, starts=None, device="cpu"):
    def bounds(sizes):
        total = torch.tensor([0, *sizes]).cumsum(0)
        return total.to(device, torch.int32)

    cumulative, padded = bounds(lengths), None if starts is None else bounds(starts)
    return SimpleNamespace(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


@devices
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "padded"])
def test_packed_sequences_are_apart(gaps, device):
    lengths, places = (4, 1, 3), (5, 2, 4) if gaps else (4, 1, 3)
    total = sum(places)
    q, k, v = (
        randn(total, heads, DIM, dtype=torch.float32, device=device, seed=seed)
        for seed, heads in enumerate((HEADS, GROUPS, GROUPS))
    )
    params = packed(lengths, places if gaps else None, device)
    layer = make_attention(on(device))
    y = layer(q, k, v, None, AttnMaskType.causal, packed_seq_params=params)
    begin = 0
    for length, place in zip(lengths, places, strict=True):
        part = [x[begin : begin + length, None] for x in (q, k, v)]
        alone = layer(*part, None, AttnMaskType.causal)[:, 0]
        torch.testing.assert_close(y[begin : begin + length], alone)
        begin += place


@devices
def test_padding_and_arbitrary_masks(device):
    q, k, v = inputs(device)
    outside = (torch.arange(SEQUENCE) >= torch.tensor([9, 5])[:, None]).to(device)
    mask = outside[:, None, None]
    both = (outside[:, None, :, None] | outside[:, None, None, :]).cpu()
    layer = make_attention(on(device), mask=AttnMaskType.padding)
    check(layer(q, k, v, mask, None), (q, k, v), both)
    arbitrary = torch.rand(BATCH, 1, SEQUENCE, SEQUENCE) > 0.4
    y = layer(q, k, v, arbitrary.to(device), AttnMaskType.arbitrary)
    check(y, (q, k, v), arbitrary)


def test_bias_is_added_to_the_scores():
    q, k, v = inputs()
    bias = torch.randn(1, HEADS, SEQUENCE, SEQUENCE, requires_grad=True)
    y = make_attention()(q, k, v, None, AttnMaskType.causal, attention_bias=bias)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
        bias.masked_fill(excluded_by(), -torch.inf),
        enable_gqa=True,
    )
    torch.testing.assert_close(y, stock.permute(2, 0, 1, 3).flatten(2))
    assert torch.autograd.grad(y.sum(), bias)[0].any()


def test_dropout_is_for_training_alone():
    q, k, v = inputs()
    layer, plain = make_attention(configuration(attention_dropout=0.5)), make_attention()
    y = layer(q, k, v, None, AttnMaskType.causal)
    expected = plain(q, k, v, None, AttnMaskType.causal)
    assert not torch.allclose(y, expected)
    torch.manual_seed(4)
    mean = sum(layer(q, k, v, None, AttnMaskType.causal) for _ in range(200)) / 200
    assert (mean - expected).norm() < 0.2 * expected.norm()
    assert torch.equal(layer.eval()(q, k, v, None, AttnMaskType.causal), expected)
    explicit = make_attention(configuration(attention_dropout=0.5), attention_dropout=0.0)
    assert torch.equal(explicit(q, k, v, None, AttnMaskType.causal), expected)


@pytest.mark.parametrize("flag", ["qk_clip", "log_max_attention_logit"])
def test_largest_logit_is_kept(flag):
    q, k, v = inputs()
    layer = make_attention(configuration(**{flag: True}))
    largest = []
    for factor in (1.0, 2.0, 0.5):
        layer(factor * q, k, v, None, AttnMaskType.no_mask)
        keys = k.repeat_interleave(HEADS // GROUPS, 2)
        scores = torch.einsum("qbhd,kbhd->bhqk", factor * q, keys) / DIM**0.5
        largest.append(scores.amax((0, 2, 3)))
    expected = torch.stack(largest).amax(0)
    torch.testing.assert_close(layer.current_max_attn_logits, expected.detach())
    assert not layer.current_max_attn_logits.requires_grad


def test_state():
    learnable = configuration(softmax_type="learnable", num_attention_heads=HEADS)
    assert list(make_attention(learnable).state_dict()) == ["softmax_offset", "_extra_state"]
    assert list(make_attention().state_dict()) == ["_extra_state"]
    make_attention().load_state_dict({})


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: make_attention(configuration(context_parallel_size=2)),
            NotImplementedError,
            "context_parallel_size: expected 1, not 2; more ranks are not built; one rank works",
        ),
        (
            lambda: make_attention().set_context_parallel_group(None, [0, 1], None),
            NotImplementedError,
            "cp_global_ranks: expected 1, not 2; more ranks are not built; one rank works",
        ),
        (
            lambda: make_attention(num_splits=4),
            ValueError,
            "num_splits: expected None or 1, not 4",
        ),
        (
            lambda: make_attention()(*inputs(queries=1), None, AttnMaskType.causal),
            ValueError,
            "attn_mask_type: expected no_mask or causal_bottom_right, not causal; "
            "the corners of the mask would differ",
        ),
        (
            lambda: make_attention()(*inputs(), None, AttnMaskType.arbitrary),
            ValueError,
            "attn_mask_type: expected an attention_mask beside it, not arbitrary alone",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == f"TEDotProductAttention: {sentence}"
