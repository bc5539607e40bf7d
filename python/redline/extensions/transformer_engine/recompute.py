# Over budget: parameters: the signatures are Transformer Engine's.
"""Regions whose activations are computed again in backward."""

from contextlib import contextmanager, nullcontext

import torch.utils.checkpoint

from redline import parallel
from redline.extensions.transformer_engine.table import works


@contextmanager
def _with_states(tracker, states):
    """The tracker's states as they were in forward; as before afterwards."""
    now = tracker.get_states()
    tracker.set_states(states)
    try:
        yield
    finally:
        tracker.set_states(now)


def checkpoint(
    function,
    *args,
    distribute_saved_activations=False,
    get_rng_state_tracker=None,
    tp_group=None,
    use_reentrant=True,
    **kwargs,
):
    """function(*args, **kwargs), which keeps its inputs alone and runs again in backward.

    The second run draws the numbers of the first: those of torch's generators, and of the tracker
    that get_rng_state_tracker() gives. distribute_saved_activations: of one rank there is nothing
    to distribute. use_reentrant: torch's other algorithm is used whatever it says.
    """
    parallel.one_rank("te_checkpoint", tp_group)
    contexts = None
    if get_rng_state_tracker is not None:
        tracker = get_rng_state_tracker()
        states = tracker.get_states()

        def contexts():
            return nullcontext(), _with_states(tracker, dict(states))

    options = {} if contexts is None else {"context_fn": contexts}
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, **options, **kwargs
    )


@works("torch.utils.checkpoint, not reentrant")
def te_checkpoint(
    forward_func,
    distribute_saved_activations,
    get_rng_state_tracker,
    tp_group,
    *args,
    **kwargs,
):
    """`checkpoint` with the arguments in the order that Megatron gives them."""
    return checkpoint(
        forward_func,
        *args,
        distribute_saved_activations=distribute_saved_activations,
        get_rng_state_tracker=get_rng_state_tracker,
        tp_group=tp_group,
        **kwargs,
    )
