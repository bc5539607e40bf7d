# Over budget: parameters: the signatures are Megatron's.
"""The linear layers in their flavours: plain, column, row, and column behind a norm."""

import torch

from redline import layers, parallel
from redline.extensions.transformer_engine.module import (
    MegatronModule,
    factory_of,
    initialise,
    mark,
    option,
)
from redline.extensions.transformer_engine.norm import TENorm
from redline.extensions.transformer_engine.refusals import ONE_RANK, check, refuse
from redline.extensions.transformer_engine.table import works

MODES = (None, "column", "row", "duplicated")


class _Product(MegatronModule):
    """One weight and one bias behind a MegatronModule."""

    def finish(self, stride=1):
        """After the parameters were made; an absent bias is an empty tensor, as Megatron asks."""
        if not self.use_bias:
            del self.bias
            self.bias = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        self.mark_parameters(self.weight, self.bias if self.use_bias else None, stride)
        self.built = True
        self.fill()

    def reset_parameters(self):
        """Fills the parameters by init_method; nothing while they are being made."""
        if self.built:
            self.fill()

    def fill(self):
        initialise(self, self.weight, self.bias if self.use_bias else None)

    def project(self, x):
        """(x W^T + bias, None), or (x W^T, bias) where the caller adds it."""
        layer, group = type(self).__name__, self.tp_group
        if self.parallel_mode == "column":
            x = parallel.column_input(x, group, self.sequence_parallel, layer)
        bias = self.bias if self.use_bias else None
        added = None if self.te_return_bias else bias
        y = self.product(x, self.weight, added, self.first_microbatch())
        if self.parallel_mode == "row":
            y = parallel.row_output(y, group, self.sequence_parallel, layer)
        return y, bias if self.te_return_bias else None


@works("`linear`")
class TELinear(_Product, layers.Linear):
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
        stride=1,
    ):
        layer = type(self).__name__
        check(layer, config, skip_weight_param_allocation=(skip_weight_param_allocation, False))
        refuse(layer, "symmetric_ar_type", symmetric_ar_type, (None,), ONE_RANK)
        refuse(layer, "gtp_remat_group", gtp_remat_group, (None,), ONE_RANK)
        refuse(layer, "gtp_replica_group", gtp_replica_group, (None,), ONE_RANK)
        refuse(layer, "parallel_mode", parallel_mode, MODES)
        if parallel_mode == "duplicated":
            refuse(layer, "tp_group", tp_group, (None,))
        options = {"bias": bias, "skip_bias_add": skip_bias_add, "expert": is_expert}
        self.settle(config, parallel_mode, tp_group, init_method, **options)
        self.ub_name = tp_comm_buffer_name
        super().__init__(
            input_size, output_size, bias, **factory_of(config), **self.gradient_options()
        )
        self.finish(stride)

    def forward(self, x):
        return self.project(x)


@works("`linear`")
class TEColumnParallelLinear(TELinear):
    """TELinear whose output is split over ranks: weight [out, in] along out."""

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
        refuse(type(self).__name__, "gather_output", gather_output, (False,))
        super().__init__(
            input_size,
            output_size,
            parallel_mode="column",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_comm_buffer_name=tp_comm_buffer_name,
            is_expert=is_expert,
            tp_group=tp_group,
            name=name,
            stride=stride,
        )


@works("`linear`")
class TERowParallelLinear(TELinear):
    """TELinear whose input is split over ranks: weight [out, in] along in."""

    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        input_is_parallel,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        tp_group=None,
        name=None,
        pg_collection=None,
    ):
        refuse(type(self).__name__, "input_is_parallel", input_is_parallel, (True,))
        super().__init__(
            input_size,
            output_size,
            parallel_mode="row",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=False,
            tp_comm_buffer_name=tp_comm_buffer_name,
            is_expert=is_expert,
            tp_group=tp_group,
            name=name,
        )


@works("`norm_linear`", "experts")
class TELayerNormColumnParallelLinear(_Product, layers.LayerNormLinear):
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
        check(
            type(self).__name__,
            config,
            gather_output=(gather_output, False),
            is_expert=(is_expert, False),
            skip_weight_param_allocation=(skip_weight_param_allocation, False),
        )
        options = {"bias": bias, "skip_bias_add": skip_bias_add}
        self.settle(config, "column", tp_group, init_method, **options)
        self.ub_name = tp_comm_buffer_name
        super().__init__(
            input_size,
            output_size,
            bias,
            normalization=config.normalization,
            eps=config.layernorm_epsilon,
            zero_centered=option(config, "layernorm_zero_centered_gamma", False),
            **factory_of(config),
            **self.gradient_options(),
        )
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                mark(parameter, sequence_parallel=self.sequence_parallel)
        self.finish(stride)

    @property
    def zero_centered_gamma(self):
        return self.zero_centered

    def fill(self):
        if not self.layer_norm_weight.is_meta:
            self.reset_norm()
        super().fill()

    def forward(self, x):
        x = x.to(self.layer_norm_weight.dtype)
        x = parallel.column_input(x, self.tp_group, self.sequence_parallel, type(self).__name__)
        bias = self.bias if self.use_bias else None
        if self.te_return_bias:
            return self.norm_product(x, None, None, self.first_microbatch()), bias
        return self.norm_product(x, bias, None, self.first_microbatch()), None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, *lists):
        held = "LayerNorm" if prefix + "layer_norm_bias" in state_dict else "RMSNorm"
        if strict and prefix + "layer_norm_weight" in state_dict and held != self.normalization:
            lists[2].append(
                f"{prefix}layer_norm_bias: the checkpoint holds a {held}, "
                f"the model a {self.normalization}"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


@works("copies of the parameters")
def split_te_layernorm_column_parallel_linear(fused_layer, config, init_method=None, tp_group=None):
    """(TENorm, TEColumnParallelLinear) with copies of a fused layer's parameters."""
    fused = fused_layer
    norm = TENorm(config, fused.in_features, eps=fused.eps)
    linear = TEColumnParallelLinear(
        fused.in_features,
        fused.out_features * fused.tp_size,
        config=config,
        init_method=init_method or (lambda weight: None),
        gather_output=False,
        bias=fused.use_bias,
        skip_bias_add=fused.te_return_bias,
        is_expert=False,
        tp_comm_buffer_name=fused.ub_name,
        tp_group=tp_group,
    )
    pairs = [(norm.weight, fused.layer_norm_weight), (linear.weight, fused.weight)]
    if fused.layer_norm_bias is not None:
        pairs.append((norm.bias, fused.layer_norm_bias))
    if fused.use_bias:
        pairs.append((linear.bias, fused.bias))
    with torch.no_grad():
        for copy, original in pairs:
            copy.copy_(original)
    linear.sequence_parallel = fused.sequence_parallel
    linear.is_first_microbatch = fused.is_first_microbatch
    linear.disable_parameter_transpose_cache = fused.disable_parameter_transpose_cache
    return norm, linear


@works("an attribute: the input is always kept as it is")
def set_save_original_input(module):
    """Asks a layer to keep its input as it is; Redline's always do."""
    if not hasattr(module, "save_original_input"):
        raise ValueError(
            f"set_save_original_input: module: expected one with save_original_input, "
            f"not {type(module).__name__}"
        )
    module.save_original_input = True
