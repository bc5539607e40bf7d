"""Megatron-Core's Transformer Engine names and signatures over Redline's layers.

One rank: tensor and context parallel groups of more, and quantised products, are refused by a
sentence. docs/megatron.md lists every name.
"""

from redline.extensions.transformer_engine.activation import TEActivationOp
from redline.extensions.transformer_engine.attention import TEDotProductAttention
from redline.extensions.transformer_engine.cross_entropy import te_parallel_cross_entropy
from redline.extensions.transformer_engine.gemm import te_general_gemm
from redline.extensions.transformer_engine.grouped_linear import (
    TEColumnParallelGroupedLinear,
    TEGroupedLinear,
    TERowParallelGroupedLinear,
)
from redline.extensions.transformer_engine.linear import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
    set_save_original_input,
    split_te_layernorm_column_parallel_linear,
)
from redline.extensions.transformer_engine.mlp import TEFusedMLP
from redline.extensions.transformer_engine.module import condition_init_method
from redline.extensions.transformer_engine.norm import TEFusedResidualRMSNorm, TENorm
from redline.extensions.transformer_engine.offload import get_cpu_offload_context
from redline.extensions.transformer_engine.padding import Fp8Padding, Fp8Unpadding
from redline.extensions.transformer_engine.permutation import (
    fused_permute,
    fused_permute_and_pad_with_probs,
    fused_permute_with_probs,
    fused_sort_chunks_by_index,
    fused_sort_chunks_by_index_with_probs,
    fused_unpermute,
)
from redline.extensions.transformer_engine.quantization import (
    TEDelayedScaling,
    TEFusedMLPWithGroupedLinear,
    TELMHeadColumnParallelLinear,
    TEQuantizationParams,
    TEQuantizationRecipe,
    TransformerEngineConfigType,
)
from redline.extensions.transformer_engine.random import TECudaRNGStatesTracker
from redline.extensions.transformer_engine.recompute import te_checkpoint
from redline.extensions.transformer_engine.refusals import check as _check  # noqa: F401
from redline.extensions.transformer_engine.rotary import (
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_thd,
)
from redline.extensions.transformer_engine.router import (
    fused_compute_score_for_moe_aux_loss,
    fused_moe_aux_loss,
    fused_topk_with_score_function,
)
from redline.extensions.transformer_engine.split import SplitAlongDim
from redline.extensions.transformer_engine.table import ENTRIES as _ENTRIES
from redline.extensions.transformer_engine.table import Entry as _Entry

HAVE_TE = True  # what asks for Transformer Engine's layers finds them here
_ENTRIES["HAVE_TE"] = _Entry("works", "`True`")

__all__ = [
    "HAVE_TE",
    "Fp8Padding",
    "Fp8Unpadding",
    "SplitAlongDim",
    "TEActivationOp",
    "TEColumnParallelGroupedLinear",
    "TEColumnParallelLinear",
    "TECudaRNGStatesTracker",
    "TEDelayedScaling",
    "TEDotProductAttention",
    "TEFusedMLP",
    "TEFusedMLPWithGroupedLinear",
    "TEFusedResidualRMSNorm",
    "TEGroupedLinear",
    "TELMHeadColumnParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TELinear",
    "TENorm",
    "TEQuantizationParams",
    "TEQuantizationRecipe",
    "TERowParallelGroupedLinear",
    "TERowParallelLinear",
    "TransformerEngineConfigType",
    "condition_init_method",
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_thd",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_permute",
    "fused_permute_and_pad_with_probs",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_topk_with_score_function",
    "fused_unpermute",
    "get_cpu_offload_context",
    "set_save_original_input",
    "split_te_layernorm_column_parallel_linear",
    "te_checkpoint",
    "te_general_gemm",
    "te_parallel_cross_entropy",
]

# Pickles name this address, wherever below it a thing is written.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = __name__
