"""The new address's MLP and activation, against the formula."""

from types import SimpleNamespace

import pytest
import torch

import reference
from megatron_config import configuration
from redline.extensions import transformer_engine as te
from tolerance import assert_close


def make_mlp(gated, bias=True, function=torch.nn.functional.silu, **changes):
    config = configuration(
        hidden_size=6,
        ffn_hidden_size=10,
        gated_linear_unit=gated,
        activation_func=function,
        add_bias_linear=bias,
        init_method=torch.nn.init.normal_,
        output_layer_init_method=torch.nn.init.normal_,
        **changes,
    )
    submodules = SimpleNamespace(
        linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear
    )
    return te.TEFusedMLP.as_mlp_submodule(config, submodules)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_mlp(name, gated, bias):
    mlp = make_mlp(gated, bias, getattr(torch.nn.functional, name))
    if bias:
        torch.nn.init.normal_(mlp.linear_fc1.bias)
    x = torch.randn(5, 2, 6)
    y, returned = mlp(x)
    assert (returned is mlp.linear_fc2.bias) if bias else (returned is None)
    fc1, fc2 = ({k: v.double() for k, v in layer.named_parameters()} for layer in mlp.children())
    up = reference.rms_norm(x.double(), fc1["layer_norm_weight"])
    up = reference.linear(up, fc1["weight"], fc1.get("bias"))
    kinds = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
    act = (
        reference.gated_activation(up, kind=kinds[name])
        if gated
        else reference.activation(up, kind=name)
    )
    assert_close(y, reference.linear(act, fc2["weight"]), roundings=16, sums=32)
    assert mlp.linear_fc1.weight.partition_stride == 1 + gated


def test_mlp_refuses_other_parts():
    sentence = "TEFusedMLP: linear_fc1: expected TELayerNormColumnParallelLinear, not TELinear"
    with pytest.raises(ValueError, match=sentence):
        te.TEFusedMLP(make_mlp(True).config, SimpleNamespace(linear_fc1=te.TELinear))
    sentence = "TEFusedMLP: activation_func: expected silu, gelu or relu of torch.nn.functional, "
    sentence += "not tanh; leave use_te_activation_func off"
    with pytest.raises(NotImplementedError, match=sentence):
        make_mlp(True, function=torch.tanh)


@pytest.mark.parametrize("gated", [True, False])
def test_activation_op(gated):
    config = configuration(activation_func=torch.nn.functional.silu, gated_linear_unit=gated)
    op, x = te.TEActivationOp(config), torch.randn(3, 8)
    expected = reference.gated_activation if gated else reference.activation
    assert_close(op(x), expected(x.double(), kind="swiglu" if gated else "silu"), roundings=4)
    config.activation_func_fp8_input_store = True
    with pytest.raises(
        NotImplementedError, match="activation_func_fp8_input_store: expected False"
    ):
        te.TEActivationOp(config)
