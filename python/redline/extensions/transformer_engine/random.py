"""Named states of the random generator, so that ranks and regions draw their own numbers."""

from contextlib import contextmanager

import torch

from redline.extensions.transformer_engine.table import works


def _on_cuda():
    return torch.cuda.is_available()


def _state():
    return torch.cuda.get_rng_state() if _on_cuda() else torch.get_rng_state()


def _set_state(state):
    if _on_cuda():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


class CudaRNGStatesTracker:
    """States by name, of the current device's generator; of the CPU's where there is no GPU.

    >>> tracker = CudaRNGStatesTracker()
    >>> tracker.add("model-parallel-rng", 1234)
    >>> with tracker.fork():
    ...     x = torch.randn(4)
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.states_, self.seeds_ = {}, set()

    def get_states(self):
        """A copy of the states by name."""
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        """The state that `seed` gives, under `name`; both must be new."""
        layer = type(self).__name__
        if seed in self.seeds_:
            raise RuntimeError(f"{layer}: seed: expected one that is not in use, not {seed}")
        if name in self.states_:
            raise RuntimeError(f"{layer}: name: expected one that is not in use, not {name}")
        self.seeds_.add(seed)
        before = _state()
        (torch.cuda.manual_seed if _on_cuda() else torch.manual_seed)(seed)
        self.states_[name] = _state()
        _set_state(before)

    @contextmanager
    def fork(self, name="model-parallel-rng"):
        """Draws from the state `name` inside, which goes on from there the next time."""
        if name not in self.states_:
            raise KeyError(f"{type(self).__name__}: name: expected one that was added, not {name}")
        before = _state()
        _set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _state()
            _set_state(before)


@works("torch's generators; the CPU's where there is no GPU")
class TECudaRNGStatesTracker(CudaRNGStatesTracker):
    """CudaRNGStatesTracker that knows whether a state was ever given to it."""

    def __init__(self, is_inference_rng_tracker=False):
        super().__init__()
        self.is_inference_rng_tracker = is_inference_rng_tracker

    def is_initialized(self):
        return self._is_initialized

    def reset(self):
        super().reset()
        self._is_initialized = False

    def set_states(self, states):
        super().set_states(states)
        self._is_initialized = True

    def add(self, name, seed):
        super().add(name, seed)
        self._is_initialized = True
