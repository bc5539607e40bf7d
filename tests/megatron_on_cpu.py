"""Megatron-Core where there is no GPU.

Megatron asks for CUDA by name in places that need none: ASKS lists them. `without_gpu` answers each
on the CPU; a request that is not listed is an error. The answers are all that it changes: torch's,
never Megatron's.
"""

import linecache
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

# What in megatron/core asks for CUDA of all that the tests run, by file and by what the line holds.
# As it is, each of these fails where there is no GPU; with one nothing here is used.
CURRENT = "torch.cuda.current_device()"
ASKS = {
    "dist_checkpointing/strategies/filesystem_async.py": ("torch.cuda.synchronize()",),
    "dist_checkpointing/strategies/state_dict_saver.py": (CURRENT,),
    "distributed/param_and_grad_buffer.py": (CURRENT, "torch.cuda.current_stream()"),
    "models/common/embeddings/rotary_pos_embedding.py": (CURRENT,),
    "optimizer/clip_grads.py": ("param.grad.type() == 'torch.cuda.FloatTensor'", "device='cuda'"),
    "optimizer/distrib_optimizer.py": (CURRENT, "param.type()", "send_tensor.cuda()"),
    "optimizer/optimizer.py": ("device='cuda'", "param.type()"),
    "tensor_parallel/random.py": ("torch.cuda.get_rng_state()", "torch.cuda.random.get_rng_state("),
    "transformer/dot_product_attention.py": (CURRENT,),
    "transformer/moe/router.py": (CURRENT,),
    "transformer/moe/token_dispatcher.py": (
        "torch.cuda.Stream()",
        "torch.cuda.current_stream()",
        "torch.cuda.stream(",
    ),
    "transformer/utils.py": ('device="cuda"',),
    "utils.py": (CURRENT, 'device="cuda"'),
}


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
    """Holds the line of Megatron's that asks, if it is one, to the list."""
    frame = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if "megatron" in parts and "core" in parts:
            place = "/".join(parts[parts.index("core") + 1 :])
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            listed = any(part in line for part in ASKS.get(place, ()))
            assert listed, f"megatron_on_cpu: ASKS has no {place}: {line}"
            return
        frame = frame.f_back


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
