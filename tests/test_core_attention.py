"""Core attention under Transformer Engine's layouts and names of masks, against the formula."""

import pytest
import torch

from cases import DEVICES, randn
from redline.layers.core_attention import MASKS, core_attention

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
LENGTHS = {"q": torch.tensor([9, 5]), "k": torch.tensor([12, 7])}


def widest(device):
    """The most exact type that the device's kernels take."""
    return torch.float64 if device == "cpu" else torch.float32


def tensors(device, queries=12, keys=12):
    dtype = widest(device)
    shapes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [
        randn(length, BATCH, heads, HEAD_DIM, dtype=dtype, device=device, seed=index)
        for index, (length, heads) in enumerate(shapes)
    ]


def outside(places, lengths):
    return (torch.arange(places) >= lengths[:, None])[:, None, None]


def formula(q, k, v, excluded, bias=0.0):
    q, k, v = (tensor.cpu().double().permute(1, 2, 0, 3) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (k, v))
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5 + bias
    probabilities = scores.masked_fill(excluded, -1e300).softmax(-1) * ~excluded
    return (probabilities @ v).permute(2, 0, 1, 3).flatten(-2)


def excluded_by(mask, queries, keys, padding, window):
    """What a mask's name means: [b, 1, queries, keys], True where a key is not seen."""
    lengths = {"q": torch.full((BATCH,), queries), "k": torch.full((BATCH,), keys)}
    excluded = torch.zeros(BATCH, 1, queries, keys, dtype=torch.bool)
    if mask.startswith("padding"):
        lengths = padding
        excluded = outside(queries, padding["q"]).transpose(-1, -2) | outside(keys, padding["k"])
    if mask == "arbitrary":
        excluded = torch.rand(BATCH, 1, queries, keys, generator=torch.manual_seed(1)) > 0.5
    shift = (lengths["k"] - lengths["q"])[:, None, None, None]
    shift = 0 * shift if mask in ("causal", "padding_causal") else shift
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - shift
    before, after = window or (-1, -1)
    after = 0 if "causal" in mask else after
    excluded = excluded | (distance > after) if after >= 0 else excluded
    return excluded | (distance < -before) if before >= 0 else excluded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, (3, 0)], ids=["full", "window"])
@pytest.mark.parametrize("queries", [9, 12])
@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask, queries, window, biased, device):
    padding = LENGTHS if queries == 9 else {"q": LENGTHS["k"], "k": LENGTHS["k"]}
    q, k, v = tensors(device, queries)
    excluded = excluded_by(mask, queries, 12, padding, window)
    given = None
    if mask == "arbitrary":
        given = excluded_by(mask, queries, 12, padding, None).to(device)
    elif mask.startswith("padding"):
        both = (outside(queries, padding["q"]), outside(12, padding["k"]))
        given = both[1].to(device) if queries == 12 else tuple(side.to(device) for side in both)
    bias = randn(1, HEADS, queries, 12, dtype=q.dtype, device=device) if biased else None
    out = core_attention(q, k, v, mask=mask, attention_mask=given, window=window, bias=bias)
    expected = formula(q, k, v, excluded, bias.cpu().double() if biased else 0.0)
    tolerance = 1e-12 if device == "cpu" else 1e-5
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_agree(device):
    q, k, v = tensors(device)
    out = core_attention(q, k, v)
    swapped = core_attention(*(x.transpose(0, 1) for x in (q, k, v)), layout="bshd")
    bounds = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * 12
    packing = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    packed = core_attention(*flat, layout="thd", mask="padding_causal", packing=packing)
    assert out.shape == (12, BATCH, HEADS * HEAD_DIM)
    torch.testing.assert_close(swapped.transpose(0, 1), out)
    torch.testing.assert_close(packed.unflatten(0, (BATCH, 12)).transpose(0, 1), out)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_keeps_the_mean(device):
    q, k, v = tensors(device, 64, 64)
    v = torch.ones_like(v)
    out = core_attention(q, k, v, mask="no_mask", dropout=0.5)
    assert 0.9 < out.mean() < 1.1
    assert out.std() > 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_max_logit(biased, device):
    q, k, v = tensors(device)
    bias = torch.zeros(1, 1, 12, 12, dtype=q.dtype, device=device) if biased else None
    _, largest = core_attention(q, k, v, mask="no_mask", bias=bias, return_max_logit=True)
    keys = k.repeat_interleave(HEADS // KV_HEADS, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, keys) / HEAD_DIM**0.5
    torch.testing.assert_close(largest, scores.amax((0, 2, 3)))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"layout": "hsbd"}, ValueError, "layout: expected sbhd bshd thd, not hsbd"),
        ({"mask": "lower"}, ValueError, f"mask: expected {' '.join(MASKS)}, not lower"),
        (
            {"mask": "padding"},
            ValueError,
            "attention_mask: expected a mask beside a padding mask",
        ),
        (
            {"mask": "arbitrary"},
            ValueError,
            "attention_mask: expected a mask beside arbitrary",
        ),
        (
            {"layout": "thd"},
            ValueError,
            "mask: expected a padding mask beside thd, not causal",
        ),
        (
            {"layout": "thd", "mask": "padding"},
            ValueError,
            "packing: expected cu_seqlens_q and cu_seqlens_k with thd",
        ),
        (
            {
                "layout": "thd",
                "mask": "padding",
                "packing": {"cu_seqlens_q": 0},
                "dropout": 0.1,
            },
            NotImplementedError,
            "bias and dropout beside thd are not built: sbhd and bshd take them",
        ),
    ],
)
def test_refuses(options, error, sentence):
    q, k, v = tensors("cpu")
    with pytest.raises(error) as caught:
        core_attention(q, k, v, **options)
    assert str(caught.value) == f"core_attention: {sentence}"
