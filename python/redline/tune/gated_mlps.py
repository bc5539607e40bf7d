"""Gated MLPs: the activation and the product in one pass; the linear layers are called as before.

Called as modules, so that LoRA, quantisation and hooks on them stay in force.
"""

from functools import partial

import torch

from redline import ops
from redline.tune.activations import kind_of
from redline.tune.recognise import Owner
from redline.tune.savings import TOKENS, Example
from redline.tune.swap import Part, Tuned, left, parts_of, swapped

GATED = {"gelu": "geglu", "quick_gelu": "quick_geglu", "relu": "reglu", "silu": "swiglu"}


class GatedMlp(Tuned):
    """down(f(gate(x)) * up(x))."""

    known = (("forward", "baf08cdb3d24"),)
    op = "ops.gated_activation_pair"
    activation = "act_fn"

    def forward(self, x):
        gate, linear = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.gated_activation_pair(gate, linear, kind=self.kind))


class PackedGatedMlp(Tuned):
    """down(f(gate) * up), gate and up the halves of one product."""

    known = (("forward", "edf95805595f"),)
    op = "ops.gated_activation"
    activation = "activation_fn"

    def forward(self, hidden_states):
        packed = self.gate_up_proj(hidden_states)
        return self.down_proj(ops.gated_activation(packed, kind=self.kind))


def parts(owner: Owner) -> list[Part]:
    stock, name = owner.family.stock("MLP"), owner.family.prefix + "MLP"
    return parts_of(owner, stock, name, partial(_mlp, owner))


def _mlp(owner, module) -> Part:
    if "act" in module._modules:
        return left(module, "not gated; its activation is a part of its own", expected=True)
    part = PackedGatedMlp if PackedGatedMlp.recognises(type(module)) is None else GatedMlp
    unknown = part.recognises(type(module))
    if unknown:
        return left(module, unknown)
    activation = module._modules.get(part.activation)
    kind = GATED.get(kind_of(activation))
    if kind is None:
        return left(module, f"no gated activation is known for {type(activation).__name__}")
    if activation._forward_hooks or activation._forward_pre_hooks or activation._backward_hooks:
        return left(module, "its activation has hooks, which a fused op would not call")
    return swapped(module, part, kind, partial(_example, owner, kind))


def _example(owner, kind, module, tuned):
    cols = owner.model.config.get_text_config().intermediate_size
    pair = [
        torch.empty(TOKENS, cols, dtype=owner.model.dtype, device="meta", requires_grad=True)
        for _ in range(2)
    ]
    activation = getattr(module, tuned.activation).forward
    return Example(
        lambda gate, linear: activation(gate) * linear,
        partial(ops.gated_activation_pair, kind=kind),
        tuple(pair),
    )
