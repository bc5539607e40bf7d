# Over budget: parameters: the signature is Transformer Engine's.
"""LayerNormLinear."""

from redline import layers
from redline.megatron.transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    factory_of,
    refuse,
)


class LayerNormLinear(TransformerEngineBaseModule, layers.LayerNormLinear):
    """`redline.layers.LayerNormLinear` under Transformer Engine's signature.

    forward(inp) -> y, then bias with return_bias, then norm(inp) with return_layernorm_output.
    """

    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device=None,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_overlap_ag=False,
        ub_overlap_rs_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        self.take(locals())
        if parallel_mode == "row":
            refuse("LayerNormLinear", "parallel_mode", "column", "row", "a norm reads whole rows")
        if parameters_split is not None:
            split = parameters_split
            refuse("LayerNormLinear", "parameters_split", None, split, "one weight is built")
        self.zero_centered_gamma = zero_centered_gamma
        super().__init__(
            in_features,
            out_features,
            bias,
            normalization=normalization,
            eps=eps,
            zero_centered=zero_centered_gamma,
            return_layernorm_output=return_layernorm_output,
            **self.gradient_options(),
            **factory_of(device, params_dtype),
        )

    def reset_parameters(self):
        self.reset_norm()
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel
        self.start(self.weight, self.bias)

    def forward(self, inp, is_first_microbatch=None, fp8_grad=False):
        x = inp.to(self.layer_norm_weight.dtype)
        bias = self.bias if self.use_bias else None
        added = None if self.return_bias else bias
        out = self.norm_product(x, added, None, is_first_microbatch)
        if not self.return_bias:
            return out
        return (out[0], bias, out[1]) if self.return_layernorm_output else (out, bias)
