"""Redline: transformer parts for PyTorch with a CUDA and a CPU backend.

``redline.ops`` are the operators, ``redline.layers`` the modules, ``redline.optim`` the optimiser.
Importing needs no GPU, no driver and no toolkit.
"""

from importlib import import_module

from redline._library import __version__

__all__ = ["__version__", "extensions", "layers", "ops", "optim"]


def __getattr__(name: str):
    if name in __all__:
        return import_module(f"redline.{name}")
    raise AttributeError(f"module 'redline' has no attribute {name!r}")
