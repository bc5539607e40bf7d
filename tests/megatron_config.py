"""Megatron's configuration and masks, as far as the tests need them, and the layers of them."""

from enum import Enum
from types import SimpleNamespace

import torch

import reference
from redline.extensions import transformer_engine as te


class AttnMaskType(Enum):
    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5
    causal_bottom_right = 6


def configuration(**changes):
    given = {
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "perform_initialization": True,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 1,
    }
    return SimpleNamespace(**(given | changes))


def on(device, **changes):
    """A configuration whose parameters are made on the device."""
    return configuration(use_cpu_initialization=device == "cpu", **changes)


IN, OUT = 8, 6


def _made(kind, config, **given):
    shared = {"config": config or configuration(), "init_method": torch.nn.init.normal_}
    shared |= {"bias": True, "skip_bias_add": False, "is_expert": False}
    return getattr(te, kind)(IN, OUT, **(shared | given))


def make_column(config=None, **changes):
    return _made("TEColumnParallelLinear", config, **({"gather_output": False} | changes))


def make_linear(mode="column", config=None, **changes):
    given = {"parallel_mode": mode, "skip_weight_param_allocation": False}
    return _made("TELinear", config, **(given | changes))


def make_row(config=None, **changes):
    return _made("TERowParallelLinear", config, **({"input_is_parallel": True} | changes))


def make_norm_linear(config=None, **changes):
    return _made("TELayerNormColumnParallelLinear", config, **({"gather_output": False} | changes))


FLAVOURS = {
    "plain": lambda config=None, **changes: make_linear(None, config, **changes),
    "duplicated": lambda config=None, **changes: make_linear("duplicated", config, **changes),
    "column": make_column,
    "row": make_row,
    "norm_column": make_norm_linear,
}


def truth(layer, x, parameters):
    """The layer's formula in float64."""
    if "layer_norm_weight" in parameters:
        norm = {"RMSNorm": reference.rms_norm, "LayerNorm": reference.layer_norm}
        gain = [parameters[k] for k in parameters if k.startswith("layer_norm")]
        x = norm[layer.normalization](x, *gain, epsilon=layer.eps)
    return reference.linear(x, parameters["weight"], parameters.get("bias"))
