"""Puts Redline's parts into a transformers model, in place; `untune` takes them out again.

The module is callable: ``redline.tune(model)`` is ``redline.tune.tune(model)``.
"""

import sys
import warnings
from types import ModuleType

import torch

from redline.tune import cross_entropy
from redline.tune.plan import plan, warn
from redline.tune.swap import Tuned, is_tuned

__all__ = ["tune", "untune"]


def tune(model: torch.nn.Module, *, dry_run: bool = False) -> torch.nn.Module:
    """Swaps the norms, gated MLPs, rotary embeddings and losses that it knows; returns `model`.

    model: a transformers model, or any module that holds some (PEFT's, a data parallel one). Its
    parameters, names, hooks, state dict and isinstance relations stay as they are: a swapped
    module changes its class for a subclass of it. What is not recognised, by class and by source,
    is left, with a warning that says why. `dry_run` prints what would happen and changes nothing.

    >>> model = redline.tune(AutoModelForCausalLM.from_pretrained("..."))
    """
    _check("tune", model)
    parts = plan(model)
    if dry_run:
        from redline.tune.table import show

        show(model, parts)
        return model
    warn(parts)
    for part in parts:
        if part.swap:
            part.swap()
    return model


def untune(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every module that `tune` swapped its stock class back; returns `model`.

    One whose class has changed since (by FSDP or a parametrization) is left, with a warning.
    """
    _check("untune", model)
    changed = set()
    for module in model.modules():
        if is_tuned(module):
            module.__class__ = module.stock
        elif isinstance(module, Tuned):
            changed.add(type(module).__name__)
        cross_entropy.restore(module)
    for name in sorted(changed):
        warnings.warn(f"untune: {name}: its class has changed since: left as it is", stacklevel=2)
    return model


def _check(name, model):
    if not isinstance(model, torch.nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{name}: model: expected a torch.nn.Module, not {kind}")


class _Callable(ModuleType):
    __call__ = staticmethod(tune)


# `redline.tune` is this module once anything under it is imported.
sys.modules[__name__].__class__ = _Callable
