"""The stock side of the dyno: a Llama-style GPT written with what torch ships, and nothing else.

Each part is written as a careful PyTorch user would: packed projections, fused AdamW and
scaled_dot_product_attention. The tuned model has the same products in the same shapes, so that what
differs between the two is what Redline claims to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of one batch, and the learning rate that suits them."""

    vocabulary: int = 8192
    hidden: int = 256
    ffn: int = 704
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    sequence: int = 256
    batch: int = 8
    epsilon: float = 1e-5
    learning_rate: float = 1e-3

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch

    @property
    def model_flops(self) -> float:
        """Operations of one step that the model cannot do without, whoever computes it.

        6 for each token and each weight that is in a product (the embedding is a lookup): 2 in
        forward, 4 in backward. Attention's scores and their product with v are 12 x layers x hidden
        x sequence a token; the causal mask leaves half of them. What is computed again is none.
        """
        widths = 2 * self.hidden + 2 * self.kv_heads * self.head_dim + 3 * self.ffn
        weights = self.hidden * (self.layers * widths + self.vocabulary)
        attention = 12 * self.layers * self.hidden * self.sequence / 2
        return self.tokens * (6.0 * weights + attention)


def rotary_tables(positions: int, dim: int, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, dim / 2], base 10000."""
    steps = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
    angles = torch.outer(
        torch.arange(positions, device=device, dtype=torch.float64), 10000.0**-steps
    )
    return angles.cos().float(), angles.sin().float()


def full_precision(x: Tensor) -> Tensor:
    """Half precision raised to float32, as every careful training script does before its loss."""
    return x.float() if x.dtype.itemsize < 4 else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [batch, sequence, heads, head_dim], first half against second half."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Norm, packed q | k | v projection, rotary, causal grouped-query attention, projection."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.widths = [shape.hidden, shape.kv_heads * shape.head_dim]
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.epsilon)
        self.qkv = nn.Linear(shape.hidden, self.widths[0] + 2 * self.widths[1], bias=False)
        self.proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        cos, sin = rotary_tables(shape.sequence, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).split([*self.widths, self.widths[1]], dim=-1)
        q = rotate(q.view(batch, sequence, self.heads, self.head_dim), self.cos, self.sin)
        k = rotate(k.view(batch, sequence, self.kv_heads, self.head_dim), self.cos, self.sin)
        v = v.view(batch, sequence, self.kv_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.proj(y.transpose(1, 2).reshape(batch, sequence, -1))


class MLP(nn.Module):
    """Norm, packed gate | up projection, SwiGLU, down projection."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.epsilon)
        self.up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, linear = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * linear)


class TransformerLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(TransformerLayer(shape) for _ in range(shape.layers))
        self.final_norm = nn.RMSNorm(shape.hidden, eps=shape.epsilon)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(full_precision(logits.flatten(0, -2)), targets.flatten())


def grouped_qkv(weight: Tensor, shape: Shape) -> Tensor:
    """Reorders the rows q | k | v as Transformer Engine groups them: for each kv head q, k, v."""
    kv = shape.kv_heads * shape.head_dim
    q, k, v = weight.split([shape.hidden, kv, kv])
    parts = [t.view(shape.kv_heads, -1, t.shape[-1]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


# Stock name -> tuned name, inside one transformer layer.
LAYER_NAMES = {
    "attention.norm.weight": "self_attention.layernorm_qkv.layer_norm_weight",
    "attention.qkv.weight": "self_attention.layernorm_qkv.weight",
    "attention.proj.weight": "self_attention.proj.weight",
    "mlp.norm.weight": "layernorm_mlp.layer_norm_weight",
    "mlp.up.weight": "layernorm_mlp.fc1_weight",
    "mlp.down.weight": "layernorm_mlp.fc2_weight",
}


def tuned_state(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The same weights under the names, and in the row order, of redline.layers."""
    renamed = {}
    for name, value in state.items():
        for stock, tuned in LAYER_NAMES.items():
            if name.endswith(stock):
                name = name.removesuffix(stock) + tuned
                value = grouped_qkv(value, shape) if stock == "attention.qkv.weight" else value
                break
        renamed[name] = value.detach().clone()
    return renamed
