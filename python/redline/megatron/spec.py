"""Layers of Megatron-Core made of `redline.extensions.transformer_engine`, for ``--spec``.

    pretrain_gpt.py --spec redline.megatron.spec gpt_layer ...

gpt_layer, gpt_layer_qk_norm, moe_layer and moe_layer_qk_norm are ModuleSpecs. Transformer Engine
need not be there, and is not used where it is.
"""

from functools import partial
from inspect import signature

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from redline.extensions import transformer_engine as address


class RedlineSpecProvider(BackendSpecProvider):
    """The address's layers, for Megatron's functions that take a backend."""

    def linear(self):
        return address.TELinear

    def column_parallel_linear(self):
        return address.TEColumnParallelLinear

    def row_parallel_linear(self):
        return address.TERowParallelLinear

    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return address.TELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
        """The configuration says which norm; has_residual: it may give its input on as well."""
        return partial(address.TENorm, has_residual=True) if has_residual else address.TENorm

    def core_attention(self):
        return address.TEDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm=False):
        """Experts and their layers: a pair up to 0.16, and since then what builds them."""
        if moe_use_grouped_gemm:
            module, products = (
                experts.TEGroupedMLP,
                {
                    "linear_fc1": address.TEColumnParallelGroupedLinear,
                    "linear_fc2": address.TERowParallelGroupedLinear,
                },
            )
        else:
            module, products = (
                experts.SequentialMLP,
                {
                    "linear_fc1": address.TEColumnParallelLinear,
                    "linear_fc2": address.TERowParallelLinear,
                },
            )
        if "moe_use_legacy_grouped_gemm" in signature(super().grouped_mlp_modules).parameters:
            return module, MLPSubmodules(**products)
        kind = experts.GroupedMLPSubmodules if moe_use_grouped_gemm else MLPSubmodules
        submodules = kind(**products, activation_func=self.activation_func())
        return partial(module, submodules=submodules)

    def activation_func(self):
        return address.TEActivationOp


def gpt_layer_spec(num_experts=None, moe_grouped_gemm=False, qk_layernorm=False):
    """A decoder layer: causal attention, and an MLP or, with num_experts, a mixture of them."""
    backend = RedlineSpecProvider()
    head_norm = backend.layer_norm(for_qk=True) if qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = get_mlp_module_spec_for_backend(
        backend=backend, num_experts=num_experts, moe_grouped_gemm=moe_grouped_gemm
    )
    submodules = TransformerLayerSubmodules(
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=backend.layer_norm() if num_experts else IdentityOp,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def gpt_block_spec(config):
    """All layers of a configuration and the norm behind them, for GPTModel's layer spec.

    Of one rank of a pipeline; every layer alike.
    """
    layer = gpt_layer_spec(config.num_moe_experts, config.moe_grouped_gemm, config.qk_layernorm)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=RedlineSpecProvider().layer_norm()
    )


gpt_layer = gpt_layer_spec()
gpt_layer_qk_norm = gpt_layer_spec(qk_layernorm=True)
# The number of experts is the configuration's.
moe_layer = gpt_layer_spec(num_experts=1, moe_grouped_gemm=True)
moe_layer_qk_norm = gpt_layer_spec(num_experts=1, moe_grouped_gemm=True, qk_layernorm=True)
