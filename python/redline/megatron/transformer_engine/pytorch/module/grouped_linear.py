# Over budget: parameters: the signature is Transformer Engine's.
"""GroupedLinear: a product per expert over rows sorted by expert."""

from redline import layers
from redline.megatron.transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    factory_of,
)


class GroupedLinear(TransformerEngineBaseModule, layers.GroupedLinear):
    """`redline.layers.GroupedLinear` under Transformer Engine's signature.

    forward(inp [.., in], m_splits) -> y [.., out], or (y without biases, biases) with return_bias;
    m_splits: rows of each expert, zero allowed.
    """

    def __init__(
        self,
        num_gemms,
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
        device=None,
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
    ):
        self.take(locals())
        self.num_gemms = num_gemms
        factory = factory_of(device, params_dtype)
        super().__init__(
            num_gemms, in_features, out_features, bias, **factory, **self.gradient_options()
        )

    def reset_parameters(self):
        for weight, bias in zip(self.weights(), self.biases(), strict=True):
            self.start(weight, bias)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        biases = self.biases()
        added = [None] * self.num_gemms if self.return_bias else biases
        rows = inp.reshape(-1, self.in_features)
        y = self.products(rows, m_splits, added, is_first_microbatch)
        y = y.view(*inp.shape[:-1], self.out_features)
        return (y, biases) if self.return_bias else y
