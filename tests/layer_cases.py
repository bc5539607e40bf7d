"""The layers that tests build, small and from one seed, and how their results are compared."""

import functools

import torch

from redline.layers import (
    GPT,
    Attention,
    LayerNorm,
    LayerNormLinear,
    LayerNormMLP,
    Linear,
    RMSNorm,
    TransformerLayer,
)

HIDDEN, FFN, HEADS, KV_HEADS = 16, 24, 4, 2

LAYERS = {
    "RMSNorm": functools.partial(RMSNorm, HIDDEN, 1e-6),
    "LayerNorm": functools.partial(LayerNorm, HIDDEN, zero_centered=True),
    "Linear": functools.partial(Linear, HIDDEN, 5),
    "LayerNormLinear": functools.partial(LayerNormLinear, HIDDEN, 5, normalization="LayerNorm"),
    "LayerNormMLP": functools.partial(LayerNormMLP, HIDDEN, FFN),
    "LayerNormMLP-gelu": functools.partial(LayerNormMLP, HIDDEN, FFN, activation="gelu"),
    "Attention": functools.partial(Attention, HIDDEN, HEADS, KV_HEADS, bias=True),
    "Attention-qk_norm": functools.partial(Attention, HIDDEN, HEADS, qk_norm=True, rotary_dim=2),
    "TransformerLayer": functools.partial(TransformerLayer, HIDDEN, FFN, HEADS, KV_HEADS),
    "TransformerLayer-selective": functools.partial(
        TransformerLayer, HIDDEN, FFN, HEADS, KV_HEADS, recompute="selective"
    ),
    "TransformerLayer-full": functools.partial(
        TransformerLayer, HIDDEN, FFN, HEADS, KV_HEADS, recompute="full"
    ),
}
GPTS = {
    "GPT": functools.partial(GPT, 31, HIDDEN, FFN, 2, HEADS, KV_HEADS),
    "GPT-tied": functools.partial(GPT, 31, HIDDEN, FFN, 2, HEADS, KV_HEADS, tied=True),
}


def seeded(make, device="cpu"):
    """A layer and its input, from the numbers that tests/cpp/layer_outputs.cpp draws too."""
    torch.manual_seed(1)
    layer, x = make(), torch.randn(2, 7, HIDDEN)
    return layer.to(device), x.to(device).requires_grad_()


def seeded_gpt(make, device="cpu"):
    """A model and [2, 9] tokens."""
    torch.manual_seed(1)
    gpt, tokens = make(), torch.randint(31, (2, 9))
    return gpt.to(device), tokens.to(device)


def agree(ours, theirs):
    """The same bits; near on CUDA, where torch's attention backward gives others on each run."""
    for a, b in zip(ours, theirs, strict=True):
        if a.is_cuda:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
