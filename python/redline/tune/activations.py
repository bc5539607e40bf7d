"""Activations: those that are known, and GPT-2's, which stock composes of eight passes."""

import sys
from functools import partial

import torch

from redline import ops
from redline.tune.recognise import Owner, fingerprint
from redline.tune.savings import TOKENS, Example
from redline.tune.swap import ALREADY, Part, Tuned, left, swapped

# class: (kind in redline.ops.activation, fingerprint of forward)
KNOWN = {
    "torch.nn.modules.activation.ReLU": ("relu", "e3600e5695ba"),
    "torch.nn.modules.activation.SiLU": ("silu", "95cae04a2880"),
    "transformers.activations.GELUTanh": ("gelu", "5e46f1fe784c"),
    "transformers.activations.NewGELUActivation": ("gelu", "d2ba170c6451"),
    "transformers.activations.QuickGELUActivation": ("quick_gelu", "ea0c817e5403"),
    "transformers.activations.SiLUActivation": ("silu", "321ac69c4b96"),
}
TANH_GELU = partial(torch.nn.functional.gelu, approximate="tanh")


class Activation(Tuned):
    """Those of KNOWN that are no single call of torch in stock."""

    known = (("forward", "d2ba170c6451"), ("forward", "ea0c817e5403"))
    op = "ops.activation"

    def forward(self, input):
        return ops.activation(input, kind=self.kind)


def kind_of(module: torch.nn.Module) -> str | None:
    """The kind of an activation in redline.ops.activation, if its class and source are known."""
    stock = type(module)
    kind, known = KNOWN.get(f"{stock.__module__}.{stock.__name__}", (None, None))
    own = getattr(sys.modules[stock.__module__], stock.__name__, None) is stock
    if not own or "forward" in vars(module) or fingerprint(stock.forward) != known:
        return None
    call = vars(module).get("act", TANH_GELU)  # GELUTanh's, whose forward is a call of it
    if not isinstance(call, partial) or call.func is not TANH_GELU.func:
        return None
    return kind if call.keywords == TANH_GELU.keywords else None


def parts(owner: Owner) -> list[Part]:
    """Of the activations that stand alone in an MLP; a gated MLP's is fused with its product."""
    stock = owner.family.stock("MLP")
    alone = [m for m in owner.modules if type(m) is stock and "act" in m._modules]
    return [_part(owner, module) for module in alone]


def _part(owner, mlp) -> Part:
    module = mlp.act
    if isinstance(module, Tuned):
        return left(module, ALREADY, expected=True)
    kind = kind_of(module)
    if kind is None:
        return left(module, "its arithmetic is none that Redline knows")
    if Activation.recognises(type(module)):
        return left(module, "one call of torch in stock, which is as fast", expected=True)

    def example(module, tuned):
        cols = mlp.c_proj.weight.shape[0]
        x = torch.empty(TOKENS, cols, dtype=owner.model.dtype, device="meta", requires_grad=True)
        return Example(type(module)().forward, lambda x: ops.activation(x, kind=kind), (x,))

    return swapped(module, Activation, kind, example)
