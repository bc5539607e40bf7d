"""One transformer block, forward and backward, as the profiler saw it: stock and tuned.

On CUDA what is counted and drawn are the GPU's kernels, copies and fills included. On the CPU they
are the ops that compute: those whose parts only allocate or describe memory. What lies between them
is the host's own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .lap import VARIANTS
from .layer_parts import transformer_layer
from .measure import DynoError, is_kernel, kind_of, quiet_profiler, saved_bytes
from .part import Case, Setting, Unavailable
from .quiet import Watch

RUNS = 5  # of each variant, in turn, while the machine is quiet; the shortest is drawn
MAX_SECONDS = 6.0  # in which it must have been
# Ops that touch no element, or only clear what they allocate.
BOOKKEEPING = {
    "alias", "as_strided", "chunk", "contiguous", "detach", "detach_", "empty", "empty_like",
    "empty_strided", "expand", "expand_as", "fill_", "flatten", "lift_fresh", "narrow",
    "new_empty", "new_zeros", "permute", "reshape", "_reshape_alias", "resize_", "resolve_conj",
    "resolve_neg", "result_type", "select", "set_", "slice", "split", "split_with_sizes",
    "squeeze", "t", "to", "transpose", "type_as", "unbind", "unflatten", "_unsafe_view",
    "unsqueeze", "view", "view_as", "zero_", "zeros", "zeros_like",
}  # fmt: skip
CASTS = {"_to_copy", "copy_"}


@dataclass(frozen=True)
class Span:
    """One kernel (CPU: op), in microseconds from the first one's start."""

    name: str
    start_us: float
    time_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.time_us

    @property
    def kind(self) -> str:
        return kind_of(self.name)


@dataclass
class Timeline:
    """The spans of one pass in order of their start; the first `forward` of them are forward's."""

    spans: list[Span]
    forward: int
    saved_bytes: int

    @property
    def time_us(self) -> float:
        return max((span.end_us for span in self.spans), default=0.0)

    @property
    def forward_us(self) -> float:
        return max((span.end_us for span in self.spans[: self.forward]), default=0.0)

    def as_dict(self) -> dict:
        return {
            "time_us": self.time_us,
            "kernels": len(self.spans),
            "saved_bytes": self.saved_bytes,
        }


@dataclass
class Block:
    shape: str
    device: str
    sides: dict[str, Timeline]
    disturbed: bool = False  # other programs ran: the times are no claim

    @property
    def unit(self) -> str:
        return "kernels" if self.device == "cuda" else "ops"

    def as_dict(self) -> dict:
        return {variant: self.sides[variant].as_dict() for variant in VARIANTS}


def measure_block(setting: Setting, on_run: Callable[[], None]) -> Block:
    """Both blocks of one weight over one input, run in turn."""
    try:
        case = transformer_layer(setting)
    except Unavailable as missing:
        raise DynoError(f"the block cannot run: {missing}") from None
    (x,) = case.inputs()
    calls = {"stock": case.stock, "tuned": case.tuned}
    runs = {variant: _Run(call, x) for variant, call in calls.items()}
    with quiet_profiler():
        for run in runs.values():
            run.warm()
        turns, disturbed = _turns(runs, setting.device, on_run)
        sides = {
            v: _timeline(case, runs[v], [turn[v] for turn in turns], setting.device)
            for v in VARIANTS
        }
    return Block(case.shape, setting.device.type, sides, disturbed)


def _turns(runs: dict[str, _Run], device: torch.device, on_run: Callable) -> tuple[list, bool]:
    """The quiet turns of both, or all turns where there was no quiet one."""
    quiet, loud, watch = [], [], Watch()
    end = time.perf_counter() + MAX_SECONDS
    while len(quiet) < RUNS and (time.perf_counter() < end or not (quiet or loud)):
        watch.restart()
        order = VARIANTS if len(quiet) % 2 else VARIANTS[::-1]
        turn = {variant: spans_of(runs[variant].both, device) for variant in order}
        if device.type == "cuda" or watch.was_quiet():
            quiet.append(turn)
            on_run()
        else:
            loud.append(turn)
    return quiet or loud, not quiet


class _Run:
    """A block's passes, the second of which gives it gradients anew."""

    def __init__(self, block: torch.nn.Module, x: Tensor):
        self.block, self.x = block, x
        self.upstream = torch.randn_like(x)
        self.leaves = [x, *block.parameters()]

    def forward(self) -> Tensor:
        return self.block(self.x)

    def both(self) -> None:
        torch.autograd.grad(self.forward(), self.leaves, self.upstream)

    def warm(self) -> None:
        for _ in range(2):
            self.both()


def _timeline(case: Case, run: _Run, found: list[list[Span]], device: torch.device) -> Timeline:
    shortest = min(found, key=lambda spans: max(span.end_us for span in spans))
    return Timeline(
        shortest,
        forward=len(spans_of(run.forward, device)),
        saved_bytes=saved_bytes(run.forward, case.living(run.block, (run.x,))),
    )


def spans_of(call: Callable[[], object], device: torch.device) -> list[Span]:
    """The kernels (CPU: the ops that compute) of one call, in order of their start."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities, record_shapes=not cuda, acc_events=True) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = profiler.events()
    chosen = [e for e in events if is_kernel(e)] if cuda else _ops(events)
    chosen.sort(key=lambda e: e.time_range.start)
    first = chosen[0].time_range.start if chosen else 0
    return [Span(e.name, e.time_range.start - first, e.time_range.elapsed_us()) for e in chosen]


def _ops(events) -> list:
    """The ops that compute and hold no other that does."""
    holders = set()
    computing = [e for e in events if _computes(e)]
    for event in computing:
        parent = event.cpu_parent
        while parent is not None and id(parent) not in holders:
            holders.add(id(parent))
            parent = parent.cpu_parent
    return [event for event in computing if id(event) not in holders]


def _computes(event) -> bool:
    """Whether it is an op that touches a tensor's elements; autograd's nodes are no ops, and a
    factor that is cast to its tensor's dtype is none either."""
    namespace, _, op = event.name.partition("::")
    if not op.isidentifier() or namespace == "autograd" or op in BOOKKEEPING:
        return False
    return op not in CASTS or any(event.input_shapes)
