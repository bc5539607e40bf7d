"""The operators: same names and arguments as in C++ (``redline::ops``).

Each works on CPU and CUDA tensors, is differentiable, traces under ``torch.compile`` and
``torch.export``, and gives the same bits on every run.
"""

from redline.ops.activation import activation
from redline.ops.adamw import adamw_step
from redline.ops.attention import attention
from redline.ops.bias_dropout_add import bias_dropout_add
from redline.ops.cross_entropy import cross_entropy
from redline.ops.embedding import embedding, embedding_backward_into
from redline.ops.fused_linear_cross_entropy import fused_linear_cross_entropy
from redline.ops.gated_activation import gated_activation, gated_activation_pair
from redline.ops.gradient_norm import clip_coefficient, gradient_norm, scale_gradients
from redline.ops.linear import WeightGradientQueue, linear
from redline.ops.norm import (
    bias_dropout_residual_layer_norm,
    bias_dropout_residual_rms_norm,
    layer_norm,
    residual_layer_norm,
    residual_rms_norm,
    rms_norm,
)
from redline.ops.norm_linear import norm_linear, norm_mlp
from redline.ops.rotary import qkv_rotary, qkv_rotary_split, rotary, rotary_pair
from redline.ops.softmax import softmax

__all__ = [
    "WeightGradientQueue",
    "activation",
    "adamw_step",
    "attention",
    "bias_dropout_add",
    "bias_dropout_residual_layer_norm",
    "bias_dropout_residual_rms_norm",
    "clip_coefficient",
    "cross_entropy",
    "embedding",
    "embedding_backward_into",
    "fused_linear_cross_entropy",
    "gated_activation",
    "gated_activation_pair",
    "gradient_norm",
    "layer_norm",
    "linear",
    "norm_linear",
    "norm_mlp",
    "qkv_rotary",
    "qkv_rotary_split",
    "residual_layer_norm",
    "residual_rms_norm",
    "rms_norm",
    "rotary",
    "rotary_pair",
    "scale_gradients",
    "softmax",
]
