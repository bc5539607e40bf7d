"""Bytes that a part keeps for backward, counted by autograd itself on meta tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

TOKENS = 64  # of the meta tensors: enough that what is kept per row shows


@dataclass(frozen=True)
class Example:
    """What a part computes for TOKENS tokens, in stock and tuned, on meta tensors."""

    stock: Callable
    tuned: Callable
    inputs: tuple
    ignored: tuple = ()  # parameters, and what others hold anyway
    repeats: int = 1  # how often it is done for a token: once per head


def bytes_per_token(example: Example) -> float:
    """What stock keeps per token and the tuned part does not."""
    from redline.dyno.measure import saved_bytes  # the dry run alone needs the profiler

    with torch.enable_grad():
        stock, tuned = (
            saved_bytes(partial(call, *example.inputs), example.ignored)
            for call in (example.stock, example.tuned)
        )
    return (stock - tuned) / TOKENS * example.repeats
