# Over budget: parameters: the signature is Megatron's.
"""TEFusedMLP: Megatron's MLP out of a norm-linear, an activation and a linear."""

import torch

from redline.extensions.transformer_engine.activation import activate, kind_of
from redline.extensions.transformer_engine.linear import (
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from redline.extensions.transformer_engine.module import option
from redline.extensions.transformer_engine.table import works


def _built(name, spec, expected, *sizes, **options):
    """A layer of a submodule's class, or of the class that a spec of it names."""
    kind = getattr(spec, "module", spec)
    if not (isinstance(kind, type) and issubclass(kind, expected)):
        found = getattr(kind, "__name__", kind)
        raise ValueError(f"TEFusedMLP: {name}: expected {expected.__name__}, not {found}")
    return kind(*sizes, **options, **getattr(spec, "params", {}))


@works(
    "its two linears; `activation` or `gated_activation` adds fc1's bias",
    "other submodules; other functions than silu, gelu (tanh), relu",
)
class TEFusedMLP(torch.nn.Module):
    """y = linear_fc2(act(linear_fc1(x))): forward(hidden_states) -> (y, bias or None).

    fc1's bias is added inside the activation. submodules: linear_fc1 a
    TELayerNormColumnParallelLinear and linear_fc2 a TERowParallelLinear, or specs of them.
    """

    def __init__(
        self,
        config,
        submodules,
        is_expert=False,
        input_size=None,
        ffn_hidden_size=None,
        tp_group=None,
        name=None,
    ):
        super().__init__()
        self.config = config
        self.kind = kind_of("TEFusedMLP", config)
        self.input_size = config.hidden_size if input_size is None else input_size
        ffn = config.ffn_hidden_size if ffn_hidden_size is None else ffn_hidden_size
        gated = config.gated_linear_unit
        shared = {"config": config, "bias": option(config, "add_bias_linear", True)}
        shared |= {"skip_bias_add": True, "is_expert": is_expert, "tp_group": tp_group}
        self.linear_fc1 = _built(
            "linear_fc1",
            submodules.linear_fc1,
            TELayerNormColumnParallelLinear,
            self.input_size,
            2 * ffn if gated else ffn,
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="fc1",
            stride=2 if gated else 1,
            **shared,
        )
        self.linear_fc2 = _built(
            "linear_fc2",
            submodules.linear_fc2,
            TERowParallelLinear,
            ffn,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="fc2",
            **shared,
        )

    def forward(self, hidden_states, **ignored):
        up, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(activate(up, bias, self.kind))

    def backward_dw(self):
        self.linear_fc2.backward_dw()
        self.linear_fc1.backward_dw()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors; the halves of a gated fc1 apart, so that ranks may change."""
        result = {}
        for name, layer in self.named_children():
            part = layer.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            result.update(part)
        if self.config.gated_linear_unit:
            from megatron.core.transformer.mlp import apply_swiglu_sharded_factory as halve

            fc1 = (f"{prefix}linear_fc1.weight", f"{prefix}linear_fc1.bias")
            result |= {key: halve(result[key], sharded_offsets) for key in fc1 if key in result}
        return result

    @classmethod
    def as_mlp_submodule(cls, config, submodules, **options):
        """An MLP of this class, for a layer's spec."""
        return cls(config, submodules, **options)
