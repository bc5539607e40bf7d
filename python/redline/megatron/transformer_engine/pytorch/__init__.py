"""Layers, contexts and functions under Transformer Engine's names."""

# Megatron reaches these by attribute from `import transformer_engine`: all are imported here.
from redline.megatron.transformer_engine.pytorch import (
    attention,
    cpp_extensions,
    cpu_offload,
    cross_entropy,
    distributed,
    fp8,
    module,
    ops,
    optimizers,
    permutation,
    router,
    tensor,
)
from redline.megatron.transformer_engine.pytorch.attention import DotProductAttention
from redline.megatron.transformer_engine.pytorch.distributed import (
    CudaRNGStatesTracker,
    checkpoint,
)
from redline.megatron.transformer_engine.pytorch.fp8 import (
    autocast,
    fp8_autocast,
    fp8_model_init,
    quantized_model_init,
)
from redline.megatron.transformer_engine.pytorch.module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    LayerNormMLP,
    Linear,
    RMSNorm,
)
from redline.megatron.transformer_engine.pytorch.permutation import (
    moe_permute,
    moe_permute_with_probs,
    moe_sort_chunks_by_index,
    moe_sort_chunks_by_index_with_probs,
    moe_unpermute,
)

__all__ = [
    "CudaRNGStatesTracker",
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "attention",
    "autocast",
    "checkpoint",
    "cpp_extensions",
    "cpu_offload",
    "cross_entropy",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "module",
    "moe_permute",
    "moe_permute_with_probs",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
    "moe_unpermute",
    "ops",
    "optimizers",
    "permutation",
    "quantized_model_init",
    "router",
    "tensor",
]
