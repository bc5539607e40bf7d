# Over budget: parameters: the signatures are Megatron's.
"""The products of a group of experts, each over its own rows."""

from redline import layers
from redline.extensions.transformer_engine.module import (
    MegatronModule,
    factory_of,
    initialise,
    option,
    sharded,
)
from redline.extensions.transformer_engine.refusals import check, refuse
from redline.extensions.transformer_engine.table import composed


@composed("`linear`, a product per expert")
class TEGroupedLinear(MegatronModule, layers.GroupedLinear):
    """y_i = x_i W_i^T + bias_i, x_i the rows of expert i: forward(x, m_splits) -> (y, biases).

    x [rows, in] sorted by expert; m_splits: rows of each expert, zero allowed; weight{i}
    [out, in], bias{i} [out]. biases is a list with skip_bias_add, else None. A product per expert:
    one product for all is not built. A checkpoint may hold weight [experts, out, in] instead.
    """

    def __init__(
        self,
        num_gemms,
        input_size,
        output_size,
        *,
        parallel_mode,
        config,
        init_method,
        bias,
        skip_bias_add,
        is_expert=False,
        tp_comm_buffer_name=None,
        pg_collection=None,
        name=None,
    ):
        layer = type(self).__name__
        check(layer, config, is_expert=(is_expert, True))
        refuse(layer, "parallel_mode", parallel_mode, (None, "column", "row"))
        tp_group = getattr(pg_collection, "expt_tp", None)
        options = {"bias": bias, "skip_bias_add": skip_bias_add, "expert": True}
        self.settle(config, parallel_mode, tp_group, init_method, **options)
        self.num_gemms, self.ub_name = num_gemms, tp_comm_buffer_name
        self._pg_collection = pg_collection
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            bias,
            **factory_of(config),
            **self.gradient_options(),
        )
        for parameters in zip(self.weights(), self.biases(), strict=True):
            self.mark_parameters(*parameters)
        self.built = True
        self.reset_parameters()

    def gradient_options(self):
        options = super().gradient_options()
        options["delay_weight_grad"] |= option(
            self.config, "overlap_dispatch_backward_with_experts_wgrad", False
        )
        return options

    def reset_parameters(self):
        """Fills the parameters by init_method, expert by expert; nothing while they are made."""
        if self.built:
            for weight, bias in zip(self.weights(), self.biases(), strict=True):
                initialise(self, weight, bias)

    def init_fp8_metadata(self, num_gemms=1):
        """Nothing: products are not quantised."""

    def forward(self, x, m_splits):
        biases = self.biases()
        added = [None] * self.num_gemms if self.te_return_bias else biases
        y = self.products(x, m_splits, added, self.first_microbatch())
        return y, biases if self.te_return_bias else None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for index in range(1, self.num_gemms):  # of distributed checkpoints
            state_dict.pop(f"{prefix}_extra_state{index}", None)
        for name in ("weight", "bias"):
            packed = state_dict.pop(prefix + name, None)
            if packed is not None:
                self._unpack(state_dict, prefix + name, packed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _unpack(self, state_dict, key, packed):
        """weight{i} and bias{i} from one tensor of all experts."""
        if packed.shape[0] % self.num_gemms:
            raise RuntimeError(
                f"{type(self).__name__}: {key}: expected a multiple of {self.num_gemms} rows, "
                f"not {list(packed.shape)}"
            )
        rank = 3 if key.endswith("weight") else 2
        parts = packed.unbind(0) if packed.dim() == rank else packed.chunk(self.num_gemms)
        state_dict.update({f"{key}{index}": part for index, part in enumerate(parts)})

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors, an entry per expert, as its SequentialMLP's."""
        from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

        singles = (metadata or {}).get("singleton_local_shards", False)
        axes = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}, None: {}}
        whole, result = self.state_dict(prefix="", keep_vars=True), {}
        for index in range(self.num_gemms):
            state = {f"{index}.weight": whole[f"weight{index}"]}
            if self.use_bias:
                state[f"{index}.bias"] = whole[f"bias{index}"]
            state[f"{index}._extra_state"] = whole["_extra_state"]
            split = {f"{index}.{name}": axis for name, axis in axes[self.parallel_mode].items()}
            expert = (len(sharded_offsets), index, self.num_gemms)
            offsets = sharded_offsets if singles else (*sharded_offsets, expert)
            part = sharded(self, state, split, "", offsets, metadata)
            replace_prefix_for_sharding(
                part, f"{index}.", f"{index}.{prefix}" if singles else prefix
            )
            for name in ("weight", "bias"):
                if f"{index}.{name}" in part:
                    result[f"{prefix}{name}{index}"] = part[f"{index}.{name}"]
            result[f"{prefix}_extra_state{index or ''}"] = part[f"{index}._extra_state"]
        return result


@composed("`linear`, a product per expert")
class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """TEGroupedLinear whose weights are marked as split along their outputs."""

    def __init__(self, num_gemms, input_size, output_size, *, is_expert, **options):
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            parallel_mode="column",
            is_expert=is_expert,
            **options,
        )


@composed("`linear`, a product per expert")
class TERowParallelGroupedLinear(TEGroupedLinear):
    """TEGroupedLinear whose weights are marked as split along their inputs."""

    def __init__(self, num_gemms, input_size, output_size, *, is_expert, **options):
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            parallel_mode="row",
            is_expert=is_expert,
            **options,
        )
