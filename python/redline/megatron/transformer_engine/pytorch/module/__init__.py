"""The layers that Megatron's own subclass."""

from redline.extensions.transformer_engine import Fp8Padding, Fp8Unpadding
from redline.megatron.transformer_engine.pytorch.module import base
from redline.megatron.transformer_engine.pytorch.module.grouped_linear import GroupedLinear
from redline.megatron.transformer_engine.pytorch.module.layernorm import LayerNorm
from redline.megatron.transformer_engine.pytorch.module.layernorm_linear import LayerNormLinear
from redline.megatron.transformer_engine.pytorch.module.layernorm_mlp import LayerNormMLP
from redline.megatron.transformer_engine.pytorch.module.linear import Linear
from redline.megatron.transformer_engine.pytorch.module.rmsnorm import RMSNorm

__all__ = [
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "base",
]
