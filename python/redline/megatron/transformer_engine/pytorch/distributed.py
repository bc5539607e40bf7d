"""Random states by name, recomputation, and the flags that it goes by."""

from contextlib import contextmanager

from redline.extensions.transformer_engine.random import CudaRNGStatesTracker
from redline.extensions.transformer_engine.recompute import checkpoint

__all__ = [
    "CudaRNGStatesTracker",
    "activation_recompute_forward",
    "checkpoint",
    "in_fp8_activation_recompute_phase",
    "is_fp8_activation_recompute_enabled",
]

_recompute = {"on": False, "phase": False}  # of the innermost activation_recompute_forward


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    """Says that what runs within is a checkpointed forward, or its repetition in backward.

    Megatron opens it around what it recomputes itself; nothing of Redline's differs by it.
    """
    before = dict(_recompute)
    _recompute.update(on=activation_recompute, phase=recompute_phase)
    try:
        yield
    finally:
        _recompute.update(before)


def is_fp8_activation_recompute_enabled():
    return _recompute["on"]


def in_fp8_activation_recompute_phase():
    return _recompute["phase"]
