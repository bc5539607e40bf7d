# Over budget: parameters: the signature is Transformer Engine's.
"""Linear."""

from redline import layers
from redline.megatron.transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    factory_of,
    refuse,
)


class Linear(TransformerEngineBaseModule, layers.Linear):
    """`redline.layers.Linear` under Transformer Engine's signature: y = x W^T + bias.

    forward(inp) -> y, or (y without bias, bias) with return_bias.
    """

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device=None,
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        self.take(locals())
        if parameters_split is not None:
            refuse("Linear", "parameters_split", None, parameters_split, "one weight is built")
        factory = factory_of(device, params_dtype)
        super().__init__(in_features, out_features, bias, **factory, **self.gradient_options())

    def reset_parameters(self):
        self.start(self.weight, self.bias)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        bias = self.bias if self.use_bias else None
        added = None if self.return_bias else bias
        y = self.product(inp, self.weight, added, is_first_microbatch)
        return (y, bias) if self.return_bias else y
