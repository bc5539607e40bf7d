"""Attention: norm, packed QKV projection, rotary, attention and the output projection."""

import torch
from torch.utils.checkpoint import checkpoint

from redline import ops
from redline.layers.linear import LayerNormLinear, Linear
from redline.layers.norm import LayerNorm, RMSNorm
from redline.layers.rotary import RotaryTables


class Attention(torch.nn.Module):
    """y = attention(rotary(qkv(norm(x)))) W^T with grouped queries, in Transformer Engine's names.

    layernorm_qkv.weight holds, for each of kv_heads groups, its queries' rows, key's and value's.
    forward(x) -> y; forward(x, residual) -> (y, x + residual), x dropped with the probability
    `dropout` first. x is [batch, sequence, hidden_size], or [tokens, hidden_size] packed with
    cu_seqlens. `window` is (keys kept before, kept after).
    recompute: backward runs ops.attention again from q, k and v, so that of what it keeps (with
    windows and packing all scores) nothing waits.

    >>> Attention(1024, heads=16, kv_heads=4)(torch.randn(2, 128, 1024)).shape
    torch.Size([2, 128, 1024])
    """

    def __init__(
        self,
        hidden_size,
        heads,
        kv_heads=None,
        head_dim=None,
        bias=False,
        *,
        causal=True,
        window=None,
        rotary_dim=None,
        rotary_base=10000.0,
        max_positions=4096,
        qk_norm=False,
        recompute=False,
        normalization="RMSNorm",
        eps=1e-5,
        zero_centered=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or hidden_size // max(heads, 1)
        rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self._check(hidden_size, head_dim, rotary_dim)
        self.causal, self.window, self.recompute = causal, window, recompute
        factory = {"device": device, "dtype": dtype}
        norm = {"eps": eps, "zero_centered": zero_centered}
        self.layernorm_qkv = LayerNormLinear(
            hidden_size,
            (heads + 2 * self.kv_heads) * self.head_dim,
            bias,
            normalization=normalization,
            **norm,
            **factory,
        )
        head_norm = RMSNorm if normalization == "RMSNorm" else LayerNorm
        self.q_norm = head_norm(self.head_dim, **norm, **factory) if qk_norm else None
        self.k_norm = head_norm(self.head_dim, **norm, **factory) if qk_norm else None
        self.rotary = (
            RotaryTables(max_positions, rotary_dim, rotary_base, device) if rotary_dim else None
        )
        self.proj = Linear(heads * self.head_dim, hidden_size, bias, **factory)

    def _check(self, hidden_size, head_dim, rotary_dim):
        heads, kv_heads = self.heads, self.kv_heads
        if heads < 1:
            raise ValueError(f"Attention: heads: expected 1 or more, not {heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"Attention: kv_heads: expected a divisor of {heads}, not {kv_heads}")
        if not head_dim and hidden_size % heads:
            raise ValueError(
                f"Attention: heads: expected a divisor of hidden_size {hidden_size}, not {heads}"
            )
        if rotary_dim % 2 or not 0 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"Attention: rotary_dim: expected an even number up to the head_dim "
                f"{self.head_dim}, not {rotary_dim}"
            )

    def _check_length(self, x, positions, cu_seqlens):
        """What rotary refused, in words of x, where it was a length beyond the tables.

        Behind the refusal: a comparison ahead of it would bind the sizes of exported programs.
        """
        if self.rotary is None or positions is not None or cu_seqlens is not None:
            return
        longest, _ = self.rotary.shape
        if x.size(1) > longest:
            raise RuntimeError(
                f"Attention: x: expected a sequence of at most {longest}, which is max_positions, "
                f"not {x.size(1)}"
            ) from None

    def split(self, qkv):
        """Views q, k, v [..., heads, head_dim] of qkv [..., (heads + 2 kv_heads) head_dim]."""
        group = self.heads // self.kv_heads
        packed = qkv.unflatten(-1, (self.kv_heads, group + 2, self.head_dim))
        q, k, v = packed.split([group, 1, 1], dim=-2)
        return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)

    def rotate(self, qkv, positions, cu_seqlens):
        """q, k, v at their positions: in one pass over the packed qkv unless q and k have norms."""
        layout = "bshd" if cu_seqlens is None else "thd"
        where = {"positions": positions, "layout": layout, "cu_seqlens": cu_seqlens}
        rotary = self.rotary
        if self.q_norm is not None:
            q, k, v = self.split(qkv)
            q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                cos, sin = rotary(qkv)
                q, k = ops.rotary_pair(q, k, cos, sin, **where)
            return q, k, v
        if rotary is not None:
            cos, sin = rotary(qkv)
            return ops.qkv_rotary_split(qkv, cos, sin, self.heads, self.kv_heads, **where)
        return self.split(qkv)

    def forward(
        self, x, residual=None, *, dropout=0.0, positions=None, cu_seqlens=None, max_seqlen=None
    ):
        if x.dim() != (3 if cu_seqlens is None else 2):
            expected = "[batch, sequence, hidden_size]"
            if cu_seqlens is not None:
                expected = "[tokens, hidden_size] beside cu_seqlens"
            raise RuntimeError(f"Attention: x: expected {expected}, not {list(x.shape)}")
        qkv = self.layernorm_qkv(x, residual, dropout=dropout)
        qkv, total = (qkv, None) if residual is None else qkv
        try:
            q, k, v = self.rotate(qkv, positions, cu_seqlens)
        except RuntimeError:
            self._check_length(x, positions, cu_seqlens)
            raise
        options = {"causal": self.causal, "window": self.window}
        if cu_seqlens is not None:
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            options |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        if self.recompute and torch.is_grad_enabled():
            options |= {"use_reentrant": False, "preserve_rng_state": False}
            context = checkpoint(ops.attention, q, k, v, **options)
        else:
            context = ops.attention(q, k, v, **options)
        y = self.proj(context.flatten(-2))
        return y if residual is None else (y, total)
