"""TransformerLayer: pre-norm attention and MLP around a residual stream."""

import torch
from torch.utils.checkpoint import checkpoint

from redline import ops
from redline.layers.attention import Attention
from redline.layers.mlp import LayerNormMLP
from redline.layers.norm import refuse_dropout

RECOMPUTE = ("none", "selective", "full")


class TransformerLayer(torch.nn.Module):
    """h = x + dropout(attention(norm(x))); y = h + dropout(mlp(norm(h))).

    Further keywords are Attention's. forward(x) -> y. forward(x, residual, dropout,
    keep_residual=True), or forward_residual(x, residual, dropout), -> (x, residual, dropout) leaves
    the last dropout and sum to the next norm, which makes them in the same pass: the stream is
    residual + dropout(x) with the probability `dropout`, or x alone where residual is None.

    recompute: what backward computes again instead of keeping it: "none"; "selective", what
    attention itself keeps between q, k, v and its output, no product; "full", all but the layer's
    inputs. pre_activation_dtype: LayerNormMLP's.

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
        recompute="none",
        pre_activation_dtype=None,
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        if recompute not in RECOMPUTE:
            expected = " ".join(RECOMPUTE)
            raise ValueError(f"TransformerLayer: recompute: expected {expected}, not {recompute}")
        self.dropout, self.recompute = dropout, recompute
        attention |= {"recompute": recompute == "selective"}
        shared = {
            "bias": bias,
            "normalization": normalization,
            "eps": eps,
            "device": device,
        }
        shared |= {"zero_centered": zero_centered, "dtype": dtype}
        self.self_attention = Attention(hidden_size, heads, kv_heads, **attention, **shared)
        self.layernorm_mlp = LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            activation=activation,
            pre_activation_dtype=pre_activation_dtype,
            **shared,
        )

    def forward_residual(self, x, residual=None, dropout=0.0, **where):
        # A call, for its hooks: FSDP's.
        return self(x, residual, dropout, keep_residual=True, **where)

    def forward(self, x, residual=None, dropout=0.0, *, keep_residual=False, **where):
        drawn = self.dropout if self.training else 0.0
        stream = (x, residual, dropout, drawn)
        if self.recompute == "full" and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": max(drawn, dropout) > 0}
            y, residual = checkpoint(self._stream, *stream, **options, **where)
        else:
            y, residual = self._stream(*stream, **where)
        if keep_residual:
            return y, residual, drawn
        return ops.bias_dropout_add(y, None, residual, drawn)

    def _stream(self, x, residual, dropout, drawn, **where):
        if residual is None:
            refuse_dropout("transformer_layer", dropout)
            attended, residual = self.self_attention(x, **where), x
        else:
            attended, residual = self.self_attention(x, residual, dropout=dropout, **where)
        return self.layernorm_mlp(attended, residual, dropout=drawn)
