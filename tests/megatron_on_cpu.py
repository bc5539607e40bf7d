"""Megatron-Core where there is no GPU.

Megatron asks for CUDA by name in places that need none. `without_gpu` answers on the CPU, and
`asked` keeps the lines that asked. The answers are all that it changes: torch's, never Megatron's.
"""

import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

asked = set()  # "file: source line" of Megatron's that asked for CUDA and got the CPU


class Idle:
    """A stream or an event of a machine that does everything at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __eq__(self, other):
        return isinstance(other, Idle)

    __hash__ = object.__hash__

    def __getattr__(self, name):
        return lambda *args, **kwargs: Idle()


def _note():
    for frame in reversed(traceback.extract_stack()[:-2]):
        parts = Path(frame.filename).parts
        if "megatron" in parts and "core" in parts:
            place = "/".join(parts[parts.index("core") + 1 :])
            asked.add(f"{place}: {frame.line}")
            return


def _noted(answer):
    def ask(*args, **kwargs):
        _note()
        return answer(*args, **kwargs)

    return ask


def _is_cuda(value):
    return str(value).startswith("cuda")


class OnCpu(TorchFunctionMode):
    """torch's functions, with the CPU wherever an argument names CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            _note()
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            _note()
            return func(*args).replace("torch.", "torch.cuda.")
        if isinstance(kwargs.get("device"), str | torch.device) and _is_cuda(kwargs["device"]):
            _note()
            kwargs["device"] = "cpu"
        args = [
            "cpu" if isinstance(arg, str | torch.device) and _is_cuda(arg) else arg for arg in args
        ]
        return func(*args, **kwargs)


CPU_ANSWERS = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *_: None,
    "current_stream": Idle,
    "default_stream": Idle,
    "Stream": Idle,
    "Event": Idle,
    "stream": lambda _: nullcontext(),
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda *_, **__: None,
}


@contextmanager
def without_gpu():
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        for name, answer in CPU_ANSWERS.items():
            patch.setattr(torch.cuda, name, _noted(answer))
        patch.setattr(torch.cuda.random, "get_rng_state", _noted(CPU_ANSWERS["get_rng_state"]))
        yield
