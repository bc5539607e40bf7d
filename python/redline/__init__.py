"""Redline: transformer parts for PyTorch with a CUDA and a CPU backend.

``redline.ops`` are the operators, ``redline.layers`` the modules, ``redline.optim`` the optimiser;
``redline.tune(model)`` puts them into a transformers model, ``redline.untune`` takes them out;
``redline.graphed(layer, sample)`` replays its forward and backward as CUDA graphs;
``redline.explain(op, *inputs)`` says which kernels run and why, and ``with redline.strict():``
refuses the slower ones.
Importing needs no GPU, no driver and no toolkit.
"""

from contextlib import suppress
from importlib import import_module

# Without the library `redline doctor` must still run; any other use raises the same error again.
with suppress(ImportError):
    from redline._library import __version__

__all__ = [
    "__version__",
    "explain",
    "extensions",
    "graphed",
    "layers",
    "ops",
    "optim",
    "strict",
    "tune",
    "untune",
]


def __getattr__(name: str):
    if name == "__version__":
        return import_module("redline._library").__version__
    if name == "untune":
        return import_module("redline.tune").untune
    if name == "graphed":
        return import_module("redline.graphs").graphed
    if name == "explain":
        return import_module("redline.explanation").explain
    if name == "strict":
        return import_module("redline.strict_mode").strict
    if name in __all__:
        return import_module(f"redline.{name}")
    raise AttributeError(f"module 'redline' has no attribute {name!r}")
