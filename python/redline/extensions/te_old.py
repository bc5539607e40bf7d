"""Megatron-Core's Transformer Engine names and signatures over Redline's layers.

One rank: tensor and context parallel groups, and quantised compute, are refused.
"""
# Over budget: parameters: the signatures are Megatron's.

import torch

from redline import ops
from redline.layers import LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TELinear",
    "TENorm",
]

# What a configuration may hold; a missing attribute counts as the first value.
_BUILT = {
    "tensor_model_parallel_size": (1,),
    "context_parallel_size": (1,),
    "sequence_parallel": (False,),
    "gradient_accumulation_fusion": (False,),
    "delay_wgrad_compute": (False,),
    "tp_comm_overlap": (False,),
    "symmetric_ar_type": (None,),
    "fp8": (None, False),
    "fp4": (None, False),
    "fused_residual_rmsnorm": (False,),
}
_ATTENTION_BUILT = {
    "apply_query_key_layer_scaling": (False,),
    "softmax_type": ("vanilla",),
    "qk_clip": (False,),
    "log_max_attention_logit": (False,),
}


def _refuse(layer, name, value, built):
    if value not in built:
        expected = " or ".join(str(choice) for choice in built)
        raise ValueError(f"{layer}: {name}: expected {expected}, not {value}")


def _check(layer, config, built=_BUILT, **options):
    for name, values in built.items():
        _refuse(layer, name, getattr(config, name, values[0]), values)
    for name, (value, expected) in options.items():
        _refuse(layer, name, value, (expected,))


def _factory(config):
    if getattr(config, "use_cpu_initialization", False):
        device = "cpu"
    elif getattr(config, "init_model_with_meta_device", False):
        device = "meta"
    else:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"device": device, "dtype": getattr(config, "params_dtype", torch.float32)}


def _norm_options(config):
    zero_centered = getattr(config, "layernorm_zero_centered_gamma", False)
    return {"zero_centered": zero_centered}


def _initialise(layer, config, init_method):
    with torch.no_grad():
        if getattr(config, "perform_initialization", True) and not layer.weight.is_meta:
            init_method(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()


def _mark(layer, mode, stride=1):
    """The attributes by which Megatron tells shards from replicas."""
    split = mode in ("column", "row")
    for parameter in layer.parameters(recurse=False):
        parameter.allreduce = True
        parameter.sequence_parallel = False
        parameter.tensor_model_parallel = False
    for parameter in (layer.weight, layer.bias if mode == "column" else None):
        if split and parameter is not None:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = 1 if mode == "row" else 0
            parameter.partition_stride = stride


class _WeightDType:
    """Transformer Engine's rule for norms: compute on, and return, the weight's dtype."""

    returns_residual = False

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class _RMSNorm(_WeightDType, RMSNorm):
    pass


class _LayerNorm(_WeightDType, LayerNorm):
    pass


class TENorm:
    """TENorm(config, hidden_size) -> the RMSNorm or LayerNorm that config.normalization names.

    >>> TENorm(config, hidden_size=4096)(x).shape == x.shape
    True
    """

    def __new__(cls, config, hidden_size, eps=1e-5, has_residual=False):
        _check("TENorm", config)
        kinds = {"LayerNorm": _LayerNorm, "RMSNorm": _RMSNorm}
        _refuse("TENorm", "normalization", config.normalization, tuple(kinds))
        norm = kinds[config.normalization](
            hidden_size, eps, **_norm_options(config), **_factory(config)
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = False
        return norm


class TELinear(Linear):
    """y = x W^T + bias: forward(x) -> (y, None), or (y without bias, bias) with skip_bias_add.

    Sizes are those of the undivided weight; parallel_mode marks the parameters for Megatron.
    """

    def __init__(
        self,
        input_size,
        output_size,
        *,
        parallel_mode,
        config,
        init_method,
        bias,
        skip_bias_add,
        skip_weight_param_allocation,
        tp_comm_buffer_name=None,
        is_expert=False,
        symmetric_ar_type=None,
        tp_group=None,
        name=None,
        gtp_remat_group=None,
        gtp_replica_group=None,
    ):
        _check(
            "TELinear",
            config,
            skip_weight_param_allocation=(skip_weight_param_allocation, False),
            is_expert=(is_expert, False),
            symmetric_ar_type=(symmetric_ar_type, None),
            gtp_remat_group=(gtp_remat_group, None),
            gtp_replica_group=(gtp_replica_group, None),
        )
        _refuse(
            "TELinear",
            "parallel_mode",
            parallel_mode,
            (None, "column", "row", "duplicated"),
        )
        super().__init__(input_size, output_size, bias, **_factory(config))
        self.config, self.parallel_mode = config, parallel_mode
        self.te_return_bias = skip_bias_add and bias
        _initialise(self, config, init_method)
        _mark(self, parallel_mode)

    def forward(self, x):
        if self.te_return_bias:
            return torch.nn.functional.linear(x, self.weight), self.bias
        return super().forward(x), None

    def backward_dw(self):
        """Nothing: weight gradients are not delayed."""


class TELayerNormColumnParallelLinear(LayerNormLinear):
    """y = norm(x) W^T + bias, for the packed QKV and the first product of an MLP.

    forward(x) -> (y, None), or (y without bias, bias) with skip_bias_add.
    """

    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        gather_output,
        bias,
        skip_bias_add,
        is_expert,
        skip_weight_param_allocation=False,
        tp_comm_buffer_name=None,
        tp_group=None,
        stride=1,
        name=None,
        pg_collection=None,
    ):
        _check(
            "TELayerNormColumnParallelLinear",
            config,
            gather_output=(gather_output, False),
            is_expert=(is_expert, False),
            skip_weight_param_allocation=(skip_weight_param_allocation, False),
        )
        super().__init__(
            input_size,
            output_size,
            bias,
            normalization=config.normalization,
            eps=config.layernorm_epsilon,
            **_norm_options(config),
            **_factory(config),
        )
        self.config = config
        self.te_return_bias = skip_bias_add and bias
        _initialise(self, config, init_method)
        _mark(self, "column", stride)

    def forward(self, x):
        normed, _ = self.normalize(x.to(self.layer_norm_weight.dtype))
        bias = self.bias if self.te_return_bias else None
        added = None if self.te_return_bias else self.bias
        return torch.nn.functional.linear(normed, self.weight, added), bias

    def backward_dw(self):
        """Nothing: weight gradients are not delayed."""


def _window(config, layer_number):
    """config.window_size on the layers that window_attn_skip_freq leaves windowed (from 1)."""
    window, skip = (
        getattr(config, "window_size", None),
        getattr(config, "window_attn_skip_freq", None),
    )
    if window is None or skip is None:
        return window
    windowed = layer_number % skip if isinstance(skip, int) else skip[layer_number - 1]
    return window if windowed else None


class TEDotProductAttention(torch.nn.Module):
    """softmax(scale q k^T) v: q [s, b, heads, d], k, v [s, b, groups, d] -> [s, b, heads d].

    Packed (packed_seq_params.qkv_format "thd"): [t, heads, d] -> [t, heads d]. The masks built are
    those that a name says; a tensor beside them is not read unless the mask is arbitrary: refused.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        num_splits=None,
        cp_comm_type="p2p",
        pg_collection=None,
    ):
        super().__init__()
        _check("TEDotProductAttention", config, {**_BUILT, **_ATTENTION_BUILT})
        _refuse("TEDotProductAttention", "attention_type", attention_type, ("self", "cross"))
        _refuse("TEDotProductAttention", "num_splits", num_splits, (None, 1))
        _refuse("TEDotProductAttention", "v_channels", v_channels, (None, k_channels))
        self.config, self.attn_mask_type = config, attn_mask_type
        self.softmax_scale = softmax_scale
        self.window = _window(config, layer_number)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type,
        attention_bias=None,
        packed_seq_params=None,
        num_splits=None,
    ):
        mask = (attn_mask_type or self.attn_mask_type).name
        _refuse("TEDotProductAttention", "attention_bias", attention_bias, (None,))
        options = {
            "causal": "causal" in mask,
            "scale": self.softmax_scale,
            "window": self.window,
            "dropout": self.dropout if self.training else 0.0,
            "deterministic": getattr(self.config, "deterministic_mode", False),
        }
        if packed_seq_params is not None:
            _refuse(
                "TEDotProductAttention",
                "attn_mask_type",
                mask,
                ("padding", "padding_causal"),
            )
            packing = _packing(packed_seq_params)
            return ops.attention(query, key, value, **options, **packing).flatten(-2)
        built = ("no_mask", "causal", "causal_bottom_right")
        if query.shape[0] != key.shape[0]:
            built = (
                "no_mask",
                "causal_bottom_right",
            )  # the op's corner is the lower right one
        _refuse("TEDotProductAttention", "attn_mask_type", mask, built)
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return ops.attention(q, k, v, **options).transpose(0, 1).flatten(-2)


def _packing(params):
    _refuse("TEDotProductAttention", "qkv_format", params.qkv_format, ("thd",))
    return {
        "cu_seqlens_q": params.cu_seqlens_q,
        "cu_seqlens_k": params.cu_seqlens_kv,
        "cu_seqlens_q_padded": params.cu_seqlens_q_padded,
        "cu_seqlens_k_padded": params.cu_seqlens_kv_padded,
        "max_seqlen_q": params.max_seqlen_q,
        "max_seqlen_k": params.max_seqlen_kv,
    }
