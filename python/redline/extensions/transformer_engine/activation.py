"""Activations by the functions that a configuration names, on Redline's ops."""

import torch

from redline import ops
from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.extensions.transformer_engine.refusals import PRECISION, NotBuilt, refuse
from redline.extensions.transformer_engine.table import works

# (function, gated) -> the op's kind. gelu is the tanh form, Transformer Engine's.
KINDS = {
    (torch.nn.functional.silu, True): "swiglu",
    (torch.nn.functional.gelu, True): "geglu",
    (torch.nn.functional.relu, True): "reglu",
    (torch.nn.functional.silu, False): "silu",
    (torch.nn.functional.gelu, False): "gelu",
    (torch.nn.functional.relu, False): "relu",
}


def kind_of(name, config):
    """The kind of activation that config.activation_func and gated_linear_unit name."""
    refuse(
        name,
        "activation_func_fp8_input_store",
        getattr(config, "activation_func_fp8_input_store", False),
        (False,),
        PRECISION,
    )
    function, gated = config.activation_func, config.gated_linear_unit
    if (function, gated) not in KINDS:
        raise NotBuilt(
            f"{name}: activation_func: expected silu, gelu or relu of torch.nn.functional, "
            f"not {getattr(function, '__name__', function)}; leave use_te_activation_func off"
        )
    return KINDS[function, gated]


def activate(x, bias, kind):
    if kind.endswith("glu"):
        return ops.gated_activation(x, kind=kind, bias=bias)
    return ops.activation(x, bias, kind)


@works(
    "`activation`, `gated_activation`",
    "inputs kept in FP8; other functions than silu, gelu (tanh), relu",
)
class TEActivationOp(ExtraState):
    """f(x), or of gated units f(gate) * linear of x's halves, as the configuration says.

    An ungated silu is silu; Megatron's own class of this name makes it relu.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = kind_of("TEActivationOp", config)

    def forward(self, x):
        return activate(x, None, self.kind)
