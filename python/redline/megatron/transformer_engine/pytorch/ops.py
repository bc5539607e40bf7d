# Over budget: parameters: the signatures are Transformer Engine's.
"""The operations that Megatron chains: its fused MLP, its residual norm, its activations."""

import torch

from redline import ops, parallel
from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.layers.weight_gradient import WeightGradient
from redline.megatron.transformer_engine.pytorch.module.base import (
    factory_of,
    normal_init,
    refuse,
)
from redline.megatron.transformer_engine.pytorch.module.layernorm import LayerNorm
from redline.megatron.transformer_engine.pytorch.module.rmsnorm import RMSNorm

__all__ = [
    "GEGLU",
    "GELU",
    "AllReduce",
    "BasicLinear",
    "Bias",
    "FusibleOperation",
    "LayerNorm",
    "MakeExtraOutput",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ReduceScatter",
    "Sequential",
    "SiLU",
    "SwiGLU",
]


class FusibleOperation(ExtraState):
    """One step of a `Sequential`: a module of one input and one output."""


class Sequential(torch.nn.Sequential):
    """Runs its modules in order: y, or (y, every extra output) behind a `MakeExtraOutput`."""

    def forward(self, x):
        extra = []
        for module in self:
            if isinstance(module, MakeExtraOutput):
                extra.append(x)
            x = module(x)
        return (x, *extra) if extra else x


class MakeExtraOutput(FusibleOperation):
    """Gives the input on, and gives it to the caller too."""

    def forward(self, x):
        return x


class BasicLinear(WeightGradient, FusibleOperation):
    """y = x W^T; weight [out, in]."""

    def __init__(
        self,
        in_features,
        out_features,
        *,
        device=None,
        dtype=None,
        tensor_parallel_mode=None,
        tensor_parallel_group=None,
        sequence_parallel=False,
        rng_state_tracker_function=None,
        accumulate_into_main_grad=False,
        userbuffers_options=None,
    ):
        super().__init__()
        parallel.one_rank("ops.BasicLinear", tensor_parallel_group)
        if userbuffers_options is not None:
            refuse("ops.BasicLinear", "userbuffers_options", None, "options", "it is not built")
        self.set_weight_gradient(accumulate_into_main_grad, False)
        weight = torch.empty(out_features, in_features, **factory_of(device, dtype))
        self.weight = torch.nn.Parameter(weight)
        if not weight.is_meta:
            normal_init(self.weight)

    def forward(self, x):
        return self.product(x, self.weight)


class Bias(FusibleOperation):
    """y = x + bias; bias [size]."""

    def __init__(
        self, size, *, device=None, dtype=None, tensor_parallel=False, tensor_parallel_group=None
    ):
        super().__init__()
        parallel.one_rank("ops.Bias", tensor_parallel_group)
        self.bias = torch.nn.Parameter(torch.zeros(size, **factory_of(device, dtype)))

    def forward(self, x):
        return x + self.bias


class Activation(FusibleOperation):
    """An activation of `redline.ops`, which keeps its input as it is."""

    kind = None

    def __init__(self, cache_quantized_input=False):
        super().__init__()
        if cache_quantized_input:
            layer = f"ops.{type(self).__name__}"
            refuse(layer, "cache_quantized_input", False, True, "the input is kept as it is")

    def forward(self, x):
        return ops.activation(x, kind=self.kind)


class GatedActivation(Activation):
    """f(gate) * linear, gate and linear the halves of the last axis."""

    def forward(self, x):
        return ops.gated_activation(x, kind=self.kind)


class GELU(Activation):
    kind = "gelu"


class SiLU(Activation):
    kind = "silu"


class ReLU(Activation):
    kind = "relu"


class SwiGLU(GatedActivation):
    kind = "swiglu"


class GEGLU(GatedActivation):
    kind = "geglu"


class ReGLU(GatedActivation):
    kind = "reglu"


class AllReduce(FusibleOperation):
    """The sum over the ranks of a group, of which there is one."""

    def __init__(self, process_group=None, reduce_in_backward=True):
        super().__init__()
        parallel.one_rank(f"ops.{type(self).__name__}", process_group)

    def forward(self, x):
        return x


class ReduceScatter(AllReduce):
    """The sum over the ranks, shared out: all of it."""
