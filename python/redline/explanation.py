"""`redline.explain`: which kernels an op runs on these inputs, how, why, and what they move."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor

import redline._library  # noqa: F401  (registers the recorder)
from redline.ops import WeightGradientQueue


@dataclass(frozen=True)
class Launch:
    """A kernel, and how it was launched.

    configuration: of ours on CUDA ``grid``, ``block``, ``shared_bytes`` and ``cluster``; of ours on
    the CPU ``instruction_set``, ``chunks`` (tasks) and ``threads``; of a library's, torch's or
    cuBLASLt's, nothing.
    """

    direction: str  # forward or backward
    op: str
    kernel: str
    configuration: dict[str, object]
    why: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found; printed, a table.

    bytes: of each step, inputs read once and outputs written once. floor_us: the time of a copy
    that moves as many, where it was measured. fallbacks: slower paths, and what avoids them.
    """

    op: str
    launches: tuple[Launch, ...]
    fallbacks: tuple[str, ...]
    forward_bytes: int
    backward_bytes: int
    floor_us: float | None

    @property
    def bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes

    def __rich__(self):
        table = Table(title=f"redline.explain({self.op})")
        for column in ("", "op", "kernel", "configuration", "why"):
            table.add_column(column, overflow="fold")
        for launch in self.launches:
            configuration = "\n".join(f"{k} {_shown(v)}" for k, v in launch.configuration.items())
            table.add_row(launch.direction, launch.op, launch.kernel, configuration, launch.why)
        lines = [f"bytes: {self.forward_bytes:,} forward"]
        if any(launch.direction == "backward" for launch in self.launches):
            lines[0] += f", {self.backward_bytes:,} backward"
        if self.floor_us is not None:
            lines.append(f"floor: {self.floor_us:,.1f} us, a copy of as many bytes")
        lines += [f"fallback: {sentence}" for sentence in self.fallbacks]
        return Group(table, *lines)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=140).print(self, markup=False, highlight=False)
        return text.getvalue().rstrip("\n")

    __repr__ = __str__


def explain(op, *inputs, measure: bool = False, **options) -> Explanation:
    """Runs ``op(*inputs, **options)`` once, watched, on copies of the tensors.

    op: one of `redline.ops`, or a function over some. The copies have the strides, the offset and
    so the alignment of the originals, which no call changes; torch's random state comes back.
    Where an input requires a gradient, backward runs too, from ones. measure: times a copy on the
    inputs' device for `floor_us`.

    >>> found = explain(redline.ops.rms_norm, torch.ones(4, 8))
    >>> [launch.op for launch in found.launches], found.bytes, found.fallbacks
    (['rms_norm_forward'], 272, ())
    """
    if not callable(op):
        raise TypeError(
            f"explain: op: expected a function, such as redline.ops.rms_norm, not {op!r}"
        )
    copies = _Copies()
    inputs, options = copies.of(inputs), copies.of(options)
    device = copies.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs, forward = _record(lambda: op(*inputs, **options))
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        ends = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
        recorded = {"forward": forward}
        if ends and copies.wanted:
            ones = [torch.ones_like(out) for out in ends]
            recorded["backward"] = _record(
                lambda: torch.autograd.grad(ends, copies.wanted, ones, allow_unused=True)
            )[1]
    moved = {direction: sum(b for _, b in found.steps()) for direction, found in recorded.items()}
    sentences = [sentence for found in recorded.values() for sentence in found.fallbacks()]
    return Explanation(
        op=getattr(op, "__name__", type(op).__name__),
        launches=tuple(launch for item in recorded.items() for launch in _launches(*item)),
        fallbacks=tuple(dict.fromkeys(sentences)),
        forward_bytes=moved["forward"],
        backward_bytes=moved.get("backward", 0),
        floor_us=1e6 * sum(moved.values()) / _copy_rate(device) if measure else None,
    )


def _record(call):
    recorder = torch.classes.redline.Recorder()
    recorder.start()
    try:
        return call(), recorder
    finally:
        recorder.stop()


def _launches(direction, recorder):
    names = [name.removeprefix("redline::") for name, _ in recorder.steps()]
    for step, kernel, shape, why in recorder.launches():
        if not shape:
            configuration = {}
        elif kernel:
            configuration = {
                "grid": tuple(shape[:3]),
                "block": tuple(shape[3:6]),
                "shared_bytes": shape[6],
                "cluster": shape[7],
            }
        else:
            configuration = {
                "instruction_set": torch.ops.redline.instruction_set(),
                "chunks": shape[0],
                "threads": shape[3],
            }
        yield Launch(direction, names[step], kernel or names[step], configuration, why)


def _copy_rate(device) -> float:
    from redline.dyno.machine import measure_copy

    return measure_copy(device)


def _shown(value) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Copies:
    """Tensors with memory of their own: a choice hangs on strides and addresses, so these stay."""

    def __init__(self):
        self.wanted = []  # those that require a gradient
        self.device = torch.device("cpu")
        self._storages = {}

    def of(self, value):
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        return WeightGradientQueue() if isinstance(value, WeightGradientQueue) else value

    def _tensor(self, tensor):
        if tensor.is_cuda:
            self.device = tensor.device
        if not tensor.requires_grad:
            return self._same_layout(tensor.detach())
        copy = _Copied.apply(tensor.detach().requires_grad_(), self._same_layout)
        self.wanted.append(copy)
        return copy

    def _same_layout(self, tensor):
        storage = tensor.untyped_storage()
        key = tensor.device, storage.data_ptr()
        if key not in self._storages:
            self._storages[key] = storage.clone()
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return copy.set_(
            self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride()
        )


class _Copied(torch.autograd.Function):
    """No leaf and no view of one: an op may write its gradient over it."""

    @staticmethod
    def forward(ctx, tensor, copy):
        return copy(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
