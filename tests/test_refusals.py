"""What a wrong input is told: one sentence that names the op, the tensor, expected and got."""

import re

import pytest
import torch

from cases import DEVICES
from redline import layers, ops

devices = pytest.mark.parametrize("device", DEVICES)


def refusal(call, *inputs, kind=RuntimeError, **options):
    """The sentence, without the source's line."""
    with pytest.raises(kind) as caught:
        call(*inputs, **options)
    return re.sub(r" \(\w+\.cpp:\d+\)$", "", str(caught.value))


# --- the width of x -----------------------------------------------------------------------------


def gpt_layer(**options):
    return layers.TransformerLayer(8, 16, 2, max_positions=8, **options)


WIDE = {
    "RMSNorm": (lambda: layers.RMSNorm(8), "rms_norm"),
    "LayerNorm": (lambda: layers.LayerNorm(8), "layer_norm"),
    "LayerNorm-bias_free": (lambda: layers.LayerNorm(8, bias=False), "layer_norm"),
    "Linear": (lambda: layers.Linear(8, 4), "linear"),
    "LayerNormLinear": (lambda: layers.LayerNormLinear(8, 4), "norm_linear"),
    "LayerNormMLP": (lambda: layers.LayerNormMLP(8, 16), "norm_mlp"),
    "Attention": (lambda: layers.Attention(8, 2), "norm_linear"),
    "TransformerLayer": (gpt_layer, "norm_linear"),
}


@devices
@pytest.mark.parametrize("name", WIDE)
def test_another_width_is_the_inputs_fault(name, device):
    make, op = WIDE[name]
    said = refusal(make().to(device), torch.ones(1, 2, 9, device=device))
    assert said == f"{op}: x: expected a last dimension of 8, not 9"


@devices
def test_a_weight_that_differs_alone_is_named(device):
    x, weight, bias = (torch.ones(*size, device=device) for size in ((2, 4), (5,), (4,)))
    said = refusal(ops.layer_norm, x, weight, bias)
    assert said.startswith("layer_norm: weight: expected [4], not [5] float32")
    said = refusal(ops.norm_linear, x, weight, None, torch.ones(3, 4, device=device))
    assert said == "norm_linear: norm_weight: expected [4], not [5]"
