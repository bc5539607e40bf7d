"""TransformerLayer: pre-norm attention and MLP around a residual stream."""

import torch

from redline import ops
from redline.layers.attention import Attention
from redline.layers.mlp import LayerNormMLP


class TransformerLayer(torch.nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)); further keywords are Attention's.

    forward_residual(x, residual) -> (x, residual) leaves the last sum to the next norm, which makes
    it in the same pass; the stream is x + residual, or x alone where residual is None.

    >>> TransformerLayer(1024, 2816, heads=16)(torch.randn(2, 128, 1024)).shape
    torch.Size([2, 128, 1024])
    """

    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        heads,
        kv_heads=None,
        *,
        bias=False,
        activation="swiglu",
        dropout=0.0,
        normalization="RMSNorm",
        eps=1e-5,
        zero_centered=False,
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        self.dropout = dropout
        shared = {
            "bias": bias,
            "normalization": normalization,
            "eps": eps,
            "device": device,
        }
        shared |= {"zero_centered": zero_centered, "dtype": dtype}
        self.self_attention = Attention(hidden_size, heads, kv_heads, **attention, **shared)
        self.layernorm_mlp = LayerNormMLP(
            hidden_size, ffn_hidden_size, activation=activation, **shared
        )

    def add(self, x, residual):
        return ops.bias_dropout_add(x, None, residual, self.dropout, self.training)

    def forward_residual(self, x, residual=None, **where):
        if residual is None:
            attended, residual = self.self_attention(x, **where), x
        else:
            attended, residual = self.self_attention(x, residual, **where)
        if not self.dropout:
            return self.layernorm_mlp(attended, residual)
        x = self.add(attended, residual)
        return self.add(self.layernorm_mlp(x), x), None

    def forward(self, x, **where):
        y, residual = self.forward_residual(x, **where)
        return y if residual is None else self.add(y, residual)
