"""TransformerLayer: pre-norm attention and MLP around a residual stream."""

import torch
from torch.utils.checkpoint import checkpoint

from redline import ops
from redline.layers.attention import Attention
from redline.layers.mlp import LayerNormMLP

RECOMPUTE = ("none", "selective", "full")


class TransformerLayer(torch.nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)); further keywords are Attention's.

    forward(x) -> y. forward(x, residual, keep_residual=True), or forward_residual(x, residual), ->
    (x, residual) leaves the last sum to the next norm, which makes it in the same pass; the stream
    is x + residual, or x alone where residual is None.

    recompute: what backward computes again instead of keeping it: "none"; "selective", what
    attention itself keeps between q, k, v and its output, no product; "full", all but the layer's
    inputs.

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
            hidden_size, ffn_hidden_size, activation=activation, **shared
        )

    def add(self, x, residual):
        return ops.bias_dropout_add(x, None, residual, self.dropout, self.training)

    def forward_residual(self, x, residual=None, **where):
        return self(x, residual, keep_residual=True, **where)  # a call, for its hooks: FSDP's

    def forward(self, x, residual=None, *, keep_residual=False, **where):
        if self.recompute == "full" and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": self.dropout > 0}
            y, residual = checkpoint(self._stream, x, residual, **options, **where)
        else:
            y, residual = self._stream(x, residual, **where)
        if keep_residual:
            return y, residual
        return y if residual is None else self.add(y, residual)

    def _stream(self, x, residual=None, **where):
        if residual is None:
            attended, residual = self.self_attention(x, **where), x
        else:
            attended, residual = self.self_attention(x, residual, **where)
        if not self.dropout:
            return self.layernorm_mlp(attended, residual)
        x = self.add(attended, residual)
        return self.add(self.layernorm_mlp(x), x), None
