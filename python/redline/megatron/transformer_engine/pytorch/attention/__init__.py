"""Core attention and rotary embeddings."""

from redline.extensions.transformer_engine import split
from redline.megatron.transformer_engine.pytorch.attention.dot_product_attention import (
    DotProductAttention,
)
from redline.megatron.transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "apply_rotary_pos_emb"]


class _SplitAlongDim:
    """Megatron takes the function from the class that Transformer Engine derives it in."""

    apply = staticmethod(split.SplitAlongDim)
