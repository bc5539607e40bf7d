"""Puts the stand-in where ``import transformer_engine`` looks."""

import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec

import redline

PACKAGE = "transformer_engine"
STAND_IN = "redline.megatron.transformer_engine"
APEX = "fused_weight_gradient_mlp_cuda"


def install():
    """Makes `transformer_engine` the part of it that Megatron-Core uses, over Redline.

    Call it before anything of megatron.core is imported. Every module is the same object under
    both names, so that what is pickled by one address is found at the other. Where Apex is not
    there, its fused_weight_gradient_mlp_cuda is stood in for too. A second call does nothing.

    Raises RuntimeError where the real Transformer Engine, or Megatron-Core without one, or the
    stand-in of another copy of Redline is already imported.
    """
    found = sys.modules.get(PACKAGE)
    if found is not None:
        _check_ours(found)
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "redline.megatron.install: megatron.core is already imported and has looked for "
            "Transformer Engine: call install() before"
        )
    stand_in = import_module(STAND_IN)
    modules = {PACKAGE: stand_in, "transformer_engine_torch": _module("transformer_engine_torch")}
    if find_spec(APEX) is None:
        modules[APEX] = _module(APEX)
    for found in pkgutil.walk_packages(stand_in.__path__, STAND_IN + "."):
        modules[PACKAGE + found.name.removeprefix(STAND_IN)] = import_module(found.name)
    sys.modules.update(modules)


def is_installed():
    """Whether `transformer_engine` is this copy's stand-in."""
    found = sys.modules.get(PACKAGE)
    return found is not None and found is sys.modules.get(STAND_IN)


def _module(name):
    return import_module(f"redline.megatron.{name}")


def _check_ours(found):
    if is_installed():
        return
    place = getattr(found, "__file__", None)
    if found.__name__ == STAND_IN:
        raise RuntimeError(
            "redline.megatron.install: two copies of Redline are in this process: "
            f"transformer_engine is {place}, this one is {redline.__file__}: keep one of them"
        )
    raise RuntimeError(
        f"redline.megatron.install: Transformer Engine is already imported from {place}: "
        "call install() before, or leave it out"
    )
