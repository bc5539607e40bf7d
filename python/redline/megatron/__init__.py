"""Megatron-Core on Redline.

`install()` lets an unmodified Megatron-Core find Redline where it looks for Transformer Engine;
`redline.megatron.spec` holds layer specs for ``--spec``; `restore_old_address()` brings back the
module that Megatron-Core took away.
"""

from importlib import import_module

_PLACES = {
    "install": "installation",
    "is_installed": "installation",
    "restore_old_address": "old_address",
}

__all__ = ["install", "is_installed", "restore_old_address"]


def __getattr__(name):
    if name in _PLACES:
        return getattr(import_module(f"redline.megatron.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'redline.megatron' has no attribute {name!r}")
