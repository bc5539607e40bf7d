"""RMSNorm and LayerNorm: one pass over memory, and one rounding, where stock takes several."""

import copy
from functools import partial

import torch

from redline import ops
from redline.tune.recognise import Owner
from redline.tune.savings import TOKENS, Example
from redline.tune.swap import Part, Tuned, left, parts_of, swapped


class RmsNorm(Tuned):
    """weight * round(x / rms(x)) in stock; here the product is rounded, once."""

    known = (("forward", "a7fc57ecee93"),)
    op = "ops.rms_norm"

    def forward(self, hidden_states):
        # Stock's product takes the wider type of the two, such as that of a float32 weight.
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        x, weight = hidden_states.to(wide), self.weight.to(wide)
        return ops.rms_norm(x, weight, self.variance_epsilon).to(wide)


class RmsNormOfInputType(Tuned):
    """round(weight * x / rms(x)) to the input's type."""

    known = (("forward", "3162f28e5776"),)
    op = "ops.rms_norm"

    def forward(self, hidden_states):
        weight = _readable(self.weight, hidden_states)
        y = ops.rms_norm(hidden_states, weight, self.variance_epsilon)
        return y.to(hidden_states.dtype)  # autocast gives float32


class ZeroCenteredRmsNorm(Tuned):
    """round((1 + weight) * x / rms(x)) to the input's type."""

    known = (("forward", "2f027d092712"), ("_norm", "f6cfbb243566"))
    op = "ops.rms_norm, zero_centered"

    def forward(self, x):
        y = ops.rms_norm(x, _readable(self.weight, x), self.eps, zero_centered=True)
        return y.to(x.dtype)  # autocast gives float32


class LayerNorm(Tuned):
    known = (("forward", "107d08a4e185"),)
    op = "ops.layer_norm"

    def forward(self, input):
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


def _readable(weight, x):
    """The op takes a weight of x's dtype or float32."""
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.float()


def parts(owner: Owner) -> list[Part]:
    name = owner.family.prefix + "RMSNorm"
    found = parts_of(owner, owner.family.stock("RMSNorm"), name, partial(_rms_norm, owner))
    return found + parts_of(owner, torch.nn.LayerNorm, "LayerNorm", partial(_layer_norm, owner))


def _rms_norm(owner, module) -> Part:
    for part in (RmsNorm, RmsNormOfInputType, ZeroCenteredRmsNorm):
        if part.recognises(type(module)) is None:
            break
    return _checked(owner, module, part)


def _layer_norm(owner, module) -> Part:
    if len(module.normalized_shape) != 1:
        shape = tuple(module.normalized_shape)
        return left(module, f"it normalises {shape}, more than the last axis")
    return _checked(owner, module, LayerNorm)


def _checked(owner, module, part) -> Part:
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not torch.nn.Parameter:
            kind = type(parameter).__name__
            return left(module, f"its {name} is a {kind}, not a plain parameter")
    return swapped(module, part, example=partial(_example, owner))


def _example(owner, module, tuned):
    parameters = {id(p): torch.nn.Parameter(p.to("meta")) for p in module.parameters()}
    shell = copy.deepcopy(module, dict(parameters))
    weight = next(iter(parameters.values()))
    x = torch.empty(TOKENS, *weight.shape, dtype=weight.dtype, device="meta", requires_grad=True)
    calls = (partial(kind.forward, shell) for kind in (tuned.stock, tuned))
    return Example(*calls, (x,), tuple(parameters.values()), _rows_per_token(owner, module))


def _rows_per_token(owner, norm) -> int:
    config = owner.model.config.get_text_config()
    for module in owner.modules:
        for name, heads in (("q_norm", "num_attention_heads"), ("k_norm", "num_key_value_heads")):
            if module._modules.get(name) is norm and norm.weight.numel() == module.head_dim:
                return getattr(config, heads)
    return 1
