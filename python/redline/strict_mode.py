"""`redline.strict`: a slower path than the op has becomes an error that says what to change."""

from contextlib import contextmanager

import torch

import redline._library  # noqa: F401  (registers the ops)


def strict(enabled: bool = True):
    """While it is entered, an op that would fall back raises RuntimeError before it does.

    What counts: unaligned addresses and rows, layouts that are copied first, attention without a
    fused kernel, and what else ``redline.explain(...).fallbacks`` lists. It holds on this thread,
    in the backward passes that it starts, and in the backward of what was computed meanwhile,
    on whichever thread and whenever that runs. ``strict(False)`` lifts it within. Enter it outside
    of compiled functions; what they call is held too.

    >>> with redline.strict():
    ...     y = redline.ops.softmax(torch.zeros(4, 8))
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"strict: enabled: expected True or False, not {enabled!r}")
    return _entered(enabled)


@contextmanager
def _entered(enabled):
    torch.ops.redline.enter_strict(enabled)
    try:
        yield
    finally:
        torch.ops.redline.leave_strict()
