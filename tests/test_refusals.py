"""What a wrong input is told: one sentence that names the op, the tensor, expected and got."""

import collections
import re

import pytest
import torch

import redline
from cases import DEVICES
from redline import layers, ops, optim

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


# --- the rank and the length of x ---------------------------------------------------------------


@devices
@pytest.mark.parametrize("shape", [(2, 8), (1, 1, 2, 8), (8,)])
def test_another_rank_is_told_in_words_of_x(shape, device):
    layer = gpt_layer().to(device)
    expected = "Attention: x: expected [batch, sequence, hidden_size], not "
    assert refusal(layer, torch.ones(shape, device=device)) == expected + str(list(shape))
    boundaries = torch.tensor([0, 2], dtype=torch.int32, device=device)
    said = refusal(layer, torch.ones(1, 2, 8, device=device), cu_seqlens=boundaries)
    assert said == "Attention: x: expected [tokens, hidden_size] beside cu_seqlens, not [1, 2, 8]"


@devices
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_long_sequence_names_max_positions(qk_norm, device):
    expected = "Attention: x: expected a sequence of at most 8, which is max_positions, not 9"
    layer = gpt_layer(qk_norm=qk_norm).to(device)
    assert refusal(layer, torch.ones(1, 9, 8, device=device)) == expected
    gpt = layers.GPT(16, 8, 16, 1, 2, max_positions=8, qk_norm=qk_norm).to(device)
    assert refusal(gpt, torch.zeros(1, 9, dtype=torch.int64, device=device)) == expected
    where = {"positions": torch.arange(9, device=device) % 8}
    assert gpt(torch.zeros(1, 9, dtype=torch.int64, device=device), **where).shape == (1, 9, 16)


def test_what_else_rotary_refuses_is_its_own_sentence():
    said = refusal(gpt_layer(), torch.ones(1, 2, 8), positions=torch.arange(3))
    assert said == "qkv_rotary_split: positions: expected [2] or [1, 2], not [3]"


def test_a_length_is_not_bound_by_an_export():
    gpt = layers.GPT(16, 8, 16, 1, 2, max_positions=8).eval()
    length = torch.export.Dim("length")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    program = torch.export.export(gpt, (tokens,), dynamic_shapes={"tokens": {1: length}})
    assert torch.equal(program.module()(tokens), gpt(tokens))


# --- what is no tensor, no function, no number --------------------------------------------------

TABLE = torch.ones(1, 1)
NONE = {
    "activation": ("x", ()),
    "bias_dropout_add": ("x", (None, torch.ones(2, 4), 0.5)),
    "gated_activation": ("x", ()),
    "layer_norm": ("x", ()),
    "qkv_rotary": ("qkv", (TABLE, TABLE, 1, 1)),
    "qkv_rotary_split": ("qkv", (TABLE, TABLE, 1, 1)),
    "rms_norm": ("x", ()),
    "rotary": ("x", (TABLE, TABLE)),
    "rotary_pair": ("q", (TABLE, TABLE, TABLE)),
    "softmax": ("scores", ()),
}


@pytest.mark.parametrize("name", NONE)
def test_none_is_no_tensor(name):
    tensor, others = NONE[name]
    said = refusal(getattr(ops, name), None, *others)
    assert said == f"{name}: {tensor}: expected a tensor, not None"


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_none_is_no_tensor_beside_one(name):
    said = refusal(getattr(ops, f"residual_{name}"), None, torch.ones(2, 4))
    assert said == f"{name}: x: expected a tensor, not None"


def test_a_name_is_not_explained():
    said = refusal(redline.explain, "rms_norm", torch.ones(4), kind=TypeError)
    assert said == (
        "explain: op: expected a function, such as redline.ops.rms_norm, not 'rms_norm'"
    )


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
def test_the_optimizers_numbers_are_numbers(option):
    parameter = torch.nn.Parameter(torch.ones(2))
    said = refusal(optim.AdamW, [parameter], kind=TypeError, **{option: "a"})
    assert said == f"AdamW: {option}: expected a number or a tensor, not 'a'"
    assert optim.AdamW([parameter], **{option: True}).param_groups[0][option] == 1


def test_the_optimizers_betas_are_two():
    said = refusal(optim.AdamW, [torch.nn.Parameter(torch.ones(2))], betas=0.9, kind=TypeError)
    assert said == "AdamW: betas: expected two numbers, not 0.9"


@pytest.mark.parametrize("enabled", [3, None, "yes"])
def test_strict_is_on_or_off(enabled):
    said = refusal(redline.strict, enabled, kind=TypeError)
    assert said == f"strict: enabled: expected True or False, not {enabled!r}"


# --- what is not built yet ----------------------------------------------------------------------


def test_a_pre_activation_in_another_dtype_is_refused():
    """Before anything is allocated; None says what is built, at every rung."""
    options = {"pre_activation_dtype": torch.float8_e4m3fn}
    sentence = (
        "pre_activation_dtype: expected None, not torch.float8_e4m3fn; keeping the pre-activation "
        "in another dtype is not built yet"
    )
    x = torch.ones(4, 4)
    made = {
        "LayerNormMLP": lambda **given: layers.LayerNormMLP(4, 8, **given),
        "TransformerLayer": lambda **given: layers.TransformerLayer(4, 8, 2, **given),
        "GPT": lambda **given: layers.GPT(8, 4, 8, 1, 2, **given),
        "norm_mlp": lambda **given: ops.norm_mlp(
            x, None, None, x, None, x, activation="relu", **given
        ),
    }
    for name, make in made.items():
        op = "norm_mlp" if name == "norm_mlp" else "LayerNormMLP"
        assert refusal(make, kind=ValueError, **options) == f"{op}: {sentence}", name
        make(pre_activation_dtype=None)


def test_the_optimizers_betas_may_be_any_sequence():
    parameter = torch.nn.Parameter(torch.ones(2))
    kept = optim.AdamW([parameter], betas=collections.UserList([0.9, 0.95]))
    assert list(kept.param_groups[0]["betas"]) == [0.9, 0.95]
