"""Measures every part of the catalogue: stock eager, torch.compile and tuned, side by side."""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .catalogue import CATALOGUE
from .layer_parts import worst_error
from .machine import Ceilings, last_cache_bytes
from .measure import interleave, saved_bytes, spread
from .part import Case, Part, Setting, Unavailable

VARIANTS = ("stock", "compiled", "tuned")
SECONDS = 0.4  # for the variants of one part in one direction
MAX_POOL_BYTES = 1 << 30


@dataclass
class Row:
    """One part in one direction; None where not measured, and `reasons` says why."""

    name: str
    direction: str
    shape: str
    dtype: str
    times: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    floor_bytes: float = 0.0
    floor_flops: float = 0.0
    of_redline: float | None = None
    floor_us: float | None = None
    disturbed: bool = False  # other programs ran: the times are no claim

    def median_us(self, variant: str) -> float | None:
        times = sorted(self.times.get(variant, ()))
        middle = len(times) // 2
        if not times:
            return None
        return times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2

    def spreads(self) -> dict[str, float]:
        return {variant: spread(times) for variant, times in self.times.items() if times}

    def speedup(self, over: str = "stock") -> float | None:
        other, tuned = self.median_us(over), self.median_us("tuned")
        return other / tuned if other and tuned else None

    def hold_against(self, ceilings: Ceilings) -> None:
        self.floor_us = ceilings.floor_us(self.floor_bytes, self.floor_flops)
        tuned = self.median_us("tuned")
        self.of_redline = self.floor_us / tuned if tuned else None

    def as_dict(self) -> dict:
        described = {key: getattr(self, key) for key in ("name", "direction", "shape", "dtype")}
        described |= {f"{v}_us": self.median_us(v) for v in VARIANTS}
        described["spread"] = max(self.spreads().values(), default=None)
        described |= {f"{v}_saved_bytes": self.saved.get(v) for v in VARIANTS}
        described |= {f"{v}_error": self.errors.get(v) for v in VARIANTS}
        return described | {"of_redline": self.of_redline}


def why_no_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
        return None
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "this Python has no Python.h"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler was found"
    return None


def measure_parts(
    setting: Setting, compile_limit: int, on_progress: Callable[[str], None]
) -> list[Row]:
    """Every part in every direction; the first `compile_limit` that ask for it compiled too."""
    rows = []
    wanted = [part.name for part in CATALOGUE if part.compiled][:compile_limit]
    for part in CATALOGUE:
        on_progress(part.name)
        rows += _measure(part, setting, part.name in wanted)
    return rows


def _measure(part: Part, setting: Setting, compiled: bool) -> list[Row]:
    try:
        case = part.make(setting)
    except Unavailable as missing:
        row = Row(part.name, part.directions[0], "", setting.dtype_name)
        row.reasons = {"tuned": str(missing)}
        return [row]
    calls = {"stock": case.stock, "tuned": case.tuned}
    reason = _add_compiled(calls, case, setting) if compiled else "outside --compile-parts"
    errors = _errors(case, calls)
    pool = _pool(case, setting)
    rows = []
    for direction in part.directions:
        row = Row(part.name, direction, case.shape, setting.dtype_name)
        both = direction != "forward"
        row.floor_bytes = case.cost.forward_bytes + both * case.cost.backward_bytes
        row.floor_flops = case.cost.forward_flops + both * case.cost.backward_flops
        timed = {name: _rotating(call, case, pool, both) for name, call in calls.items()}
        timing = interleave(timed, setting.device, SECONDS * len(timed) / 2)
        row.times, row.disturbed = timing.times, timing.disturbed
        row.errors = {name: both_errors[both] for name, both_errors in errors.items()}
        if both and case.differentiable:
            row.saved = {name: _saved(call, case, pool[0]) for name, call in calls.items()}
        if reason:
            row.reasons["compiled"] = reason
        rows.append(row)
    return rows


def _saved(call: Callable, case: Case, sample: _Sample) -> int:
    return saved_bytes(lambda: call(*sample.inputs), case.living(call, sample.inputs))


def _add_compiled(calls: dict[str, Callable], case: Case, setting: Setting) -> str | None:
    """Compiles the stock form, forward and backward, before any clock runs."""
    reason = why_no_compiler(setting.device)
    if reason is None:
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(case.stock), fullgraph=True, dynamic=False)
        try:
            sample = _Sample(case)
            sample.run(compiled, case, backward=case.differentiable)
            with torch.no_grad():
                compiled(*sample.inputs)
        except Exception as error:
            reason = f"torch.compile failed: {str(error).strip().splitlines()[0][:120]}"
        else:
            calls["compiled"] = compiled
    return reason


class _Sample:
    """One set of fresh random inputs, and the upstream gradients that match the outputs."""

    def __init__(self, case: Case):
        self.inputs = case.inputs()
        self.upstream: tuple[Tensor, ...] | None = None

    def run(self, call: Callable, case: Case, backward: bool):
        if not case.differentiable:
            return call(*self.inputs)
        if not backward:
            with torch.no_grad():
                return call(*self.inputs)
        outputs = _tuple(call(*self.inputs))
        if self.upstream is None:
            self.upstream = tuple(torch.randn_like(y) for y in outputs)
        leaves = [t for t in self.inputs if t.requires_grad]
        leaves += [p for p in _parameters(call) if p.requires_grad]
        return torch.autograd.grad(outputs, leaves, self.upstream)


def _tuple(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _parameters(call: Callable) -> list[Tensor]:
    return list(call.parameters()) if isinstance(call, torch.nn.Module) else []


def _pool(case: Case, setting: Setting) -> list[_Sample]:
    """So many samples that together they are larger than twice the last cache."""
    first = _Sample(case)
    size = sum(t.nbytes for t in first.inputs)
    wanted = 2 * last_cache_bytes(setting.device)
    count = 1 if not size else min(64, max(2, -(-wanted // size)))
    if size * count > MAX_POOL_BYTES:
        count = 2
    pool = [first] + [_Sample(case) for _ in range(count - 1)]
    if case.differentiable:
        for sample in pool:  # the upstream gradients are made outside the clock
            sample.run(case.stock, case, backward=True)
    return pool


def _rotating(call: Callable, case: Case, pool: list[_Sample], backward: bool) -> Callable:
    turn = iter(range(1 << 62))
    return lambda: pool[next(turn) % len(pool)].run(call, case, backward)


def _errors(case: Case, calls: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """variant -> (error of the outputs, worst error of the input gradients), against float64."""
    if case.errors is not None:
        return case.errors(calls)
    calls = calls | (case.checked or {})
    sample = _Sample(case)
    exact = [_exact(t) for t in sample.inputs]
    outputs = {name: _tuple(call(*sample.inputs)) for name, call in calls.items()}
    upstream = [torch.randn_like(y) for y in outputs["stock"]]
    truth_call = calls["stock"]
    if isinstance(truth_call, torch.nn.Module):
        truth_call = copy.deepcopy(truth_call).double()
    truth = _tuple(truth_call(*exact))
    truth_grads = _input_grads(truth, exact, upstream)
    found = {}
    for name, values in outputs.items():
        grads = _input_grads(values, sample.inputs, upstream)
        found[name] = (worst_error(values, truth), worst_error(grads, truth_grads))
    return found


def _input_grads(outputs, inputs, upstream) -> tuple[Tensor, ...]:
    leaves = [t for t in inputs if t.requires_grad]
    matching = [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, matching)


def _exact(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
