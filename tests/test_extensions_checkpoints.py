"""The new address's state dicts, copies and pickles."""

import copy
import pickle

import pytest
import torch

from megatron_config import (
    FLAVOURS,
    IN,
    OUT,
    configuration,
    make_column,
    make_norm_linear,
    make_row,
)
from redline.extensions import transformer_engine as te

flavours = pytest.mark.parametrize("make", FLAVOURS.values(), ids=FLAVOURS)


def test_state_dicts_go_to_torch_and_back():
    ours, stock = make_column(), torch.nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(x)[0], stock(x))
    state = make_row().state_dict()
    assert list(state) == ["weight", "bias", "_extra_state"]
    extra = state.pop("_extra_state")
    assert (extra.dtype, extra.numel(), extra.device.type) == (torch.uint8, 0, "cpu")
    stock.load_state_dict(state)


def test_extra_state_is_accepted_whatever_it_holds():
    layer = make_norm_linear()
    assert list(layer.state_dict()) == ["layer_norm_weight", "weight", "bias", "_extra_state"]
    for extra in (torch.ones(7, dtype=torch.uint8), None, b"pickled"):
        layer.load_state_dict(layer.state_dict() | {"_extra_state": extra})
    norm = te.TENorm(configuration(), IN)
    norm.load_state_dict({"weight": torch.ones(IN)})
    assert list(norm.state_dict()) == ["weight", "_extra_state"]


def test_an_absent_bias_is_an_empty_tensor_and_no_key():
    for make in FLAVOURS.values():
        layer = make(bias=False)
        assert isinstance(layer.bias, torch.Tensor) and layer.bias.numel() == 0
        assert "bias" not in layer.state_dict()
        y, bias = layer(torch.ones(2, IN))
        assert y.shape == (2, OUT) and bias is None


@pytest.mark.parametrize(("held", "model"), [("LayerNorm", "RMSNorm"), ("RMSNorm", "LayerNorm")])
def test_a_checkpoint_of_another_norm_is_named(held, model):
    state = make_norm_linear(configuration(normalization=held)).state_dict()
    layer = make_norm_linear(configuration(normalization=model))
    sentence = f"layer_norm_bias: the checkpoint holds a {held}, the model a {model}"
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict(state)


def test_wrong_checkpoints_name_the_key_and_both_sides():
    layer = make_column()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict({"weight": torch.ones(OUT, IN)})
    wrong = layer.state_dict() | {"weight": torch.ones(OUT, IN + 1)}
    with pytest.raises(RuntimeError, match=r"weight: .*\[6, 9\].*\[6, 8\]"):
        layer.load_state_dict(wrong)


@flavours
def test_copies_and_pickles(make):
    layer = make(init_method=torch.nn.init.normal_)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(torch.ones(2, IN))[0], layer(torch.ones(2, IN))[0])
    assert type(layer).__module__ == "redline.extensions.transformer_engine"


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_split_of_a_norm_linear(normalization, bias):
    config = configuration(normalization=normalization)
    layer = make_norm_linear(config, bias=bias)
    torch.nn.init.normal_(layer.layer_norm_weight)
    norm, linear = te.split_te_layernorm_column_parallel_linear(layer, config)
    x = torch.randn(3, IN)
    assert torch.equal(linear(norm(x))[0], layer(x)[0])
    assert linear.weight is not layer.weight


def test_save_original_input():
    layer = make_column()
    te.set_save_original_input(layer)
    assert layer.save_original_input is True
    sentence = "module: expected one with save_original_input, not ReLU"
    with pytest.raises(ValueError, match=f"^set_save_original_input: {sentence}$"):
        te.set_save_original_input(torch.nn.ReLU())
