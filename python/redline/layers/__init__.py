"""Transformer layers: torch.nn's and Transformer Engine's names and parameters over redline.ops."""

from redline.layers.attention import Attention
from redline.layers.embedding import Embedding
from redline.layers.gpt import GPT
from redline.layers.grouped_linear import GroupedLinear
from redline.layers.linear import LayerNormLinear, Linear
from redline.layers.mlp import LayerNormMLP
from redline.layers.norm import LayerNorm, RMSNorm
from redline.layers.transformer_layer import TransformerLayer

__all__ = [
    "GPT",
    "Attention",
    "Embedding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "TransformerLayer",
]
