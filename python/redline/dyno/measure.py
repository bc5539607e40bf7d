"""How time, memory, saved bytes and error are measured: once, and for every variant alike."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .quiet import Watch

MIN_ROUNDS, MAX_ROUNDS = 5, 2000
PATIENCE = 3  # times the planned seconds, while the machine is not quiet
SPIN_CYCLES = 2_000_000  # about 1 ms: the host queues the calls while the GPU spins


class DynoError(Exception):
    """What the user is told, in one line."""


@dataclass
class Timing:
    """Microseconds per call of each variant; `disturbed` where the machine was never quiet."""

    times: dict[str, list[float]]
    disturbed: bool = False


def interleave(
    variants: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> Timing:
    """Times the variants in turn, another one first each round.

    What slows the whole machine thus falls on all of them alike. Rounds during which other programs
    took the processor are left out. A call's result is freed before the next clock starts.
    """
    for call in variants.values():
        for _ in range(2):
            call()
    kept, dropped, slice_ = [], [], []
    watch, start = Watch(), time.perf_counter()
    for turn in range(MAX_ROUNDS):
        slice_.append(_round(variants, device, turn))
        if watch.ripe or turn + 1 == MAX_ROUNDS:
            quiet = device.type == "cuda" or watch.was_quiet()
            (kept if quiet else dropped).extend(slice_)
            slice_ = []
        elapsed = time.perf_counter() - start
        enough = len(kept) >= MIN_ROUNDS and elapsed > seconds
        if enough or (elapsed > PATIENCE * seconds and len(kept) + len(dropped) >= MIN_ROUNDS):
            break
    disturbed = len(kept) < MIN_ROUNDS
    rounds = kept + dropped if disturbed else kept
    return Timing({name: [r[name] for r in rounds] for name in variants}, disturbed)


def _round(variants: dict[str, Callable], device: torch.device, turn: int) -> dict[str, float]:
    clock = _cuda_us if device.type == "cuda" else _cpu_us
    names = list(variants)
    shift = turn % len(names)
    order = names[shift:] + names[:shift]
    if turn // len(names) % 2:  # who runs finds what the one before left in the caches
        order.reverse()
    return {name: clock(variants[name]) for name in order}


def _cpu_us(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    result = call()
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed / 1e3


def _cuda_us(call: Callable[[], object], repeats: int = 5) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    before.record()
    for _ in range(repeats):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3 / repeats


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def saved_bytes(call: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps between forward and backward.

    Python and C++ nodes alike save through these hooks. `excluded` live anyway: the
    parameters. An input counts: it would be free by then if the part did not keep it. Meta tensors
    have no addresses, so storages are told apart by identity.
    """
    ignored = {t.untyped_storage()._cdata for t in excluded}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values())


def relative_error(values: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    """The worst relative L2 distance from the float64 truth."""
    worst = 0.0
    for value, truth in zip(values, truths, strict=True):
        scale = truth.norm().item()
        distance = (value.double() - truth).norm().item()
        worst = max(worst, distance / scale if scale else distance)
    return worst


# Names of torch's and our ops, and of the kernels of cuBLAS, cuDNN and flash attention.
ATTENTION = re.compile(r"attention|flash|fmha|sdpa")
GEMM = re.compile(
    r"^(aten::(mm|addmm|bmm|baddbmm|mkldnn_linear)|mkldnn::_linear_pointwise|redline::gemm\w*)$|"
    r"nvjet|gemm|gemv|cutlass|splitk",
    re.IGNORECASE,
)
KINDS = ("gemm", "attention", "rest")


@dataclass
class Profiled:
    """One profiled run: the allocator's peak above where it began, and the share of each kind."""

    peak_bytes: int
    shares: dict[str, float]


def profiled(run: Callable[[], object], device: torch.device) -> Profiled:
    """Runs once; everything that `run` allocates, the model included, counts for the peak.

    On the CPU the peak is the highest running sum of the allocator's own events; on CUDA it is the
    caching allocator's counter. Memory that MKL and oneDNN take for themselves is in neither.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=activities, profile_memory=not cuda, acc_events=True) as profiler:
        result = run()
    del result
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else _highest_sum(profiler)
    return Profiled(peak, _shares(profiler, cuda))


def _highest_sum(profiler: profile) -> int:
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def _shares(profiler: profile, cuda: bool) -> dict[str, float]:
    totals = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if not cuda:
            totals[kind_of(event.key)] += event.self_cpu_time_total
        elif is_kernel(event) and not event.key.startswith("Memcpy HtoD"):
            # An op's time is that of its kernels; weights on their way to the GPU are no step's.
            totals[kind_of(event.key)] += event.self_device_time_total
    whole = sum(totals.values()) or 1.0
    return {kind: spent / whole for kind, spent in totals.items()}


def is_kernel(event) -> bool:
    """Whether it ran on the GPU; a range that a program named is drawn there too, over kernels."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def kind_of(name: str) -> str:
    """gemm, attention or rest, of an op or of a kernel."""
    if ATTENTION.search(name):
        return "attention"
    return "gemm" if GEMM.search(name) else "rest"


@contextmanager
def quiet_profiler():
    """Keeps the profiler's own notices off the screen."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.profiler.*")
        logger = logging.getLogger("torch")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
