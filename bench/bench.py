"""Times an op against its floor and its rivals, the same way for all ops.

    PYTHONPATH=python python bench/bench.py [OP ...] [--rivals] [--json FILE] [--markdown FILE]
    PYTHONPATH=python python bench/bench.py compare BEFORE.json AFTER.json
    PYTHONPATH=python python bench/bench.py targets RESULT.json
    PYTHONPATH=python python bench/bench.py plot RESULT.json [PICTURE.svg]
    PYTHONPATH=python python bench/bench.py markdown RESULT.json [TABLE.md]

Each ``bench_<op>.py`` states cases, the call, the fewest bytes it must move and its baselines.
Here: fresh random data in several input sets that together exceed the last cache, CUDA graphs of
many launches (CPU: single calls), variants interleaved, median and spread; the floor is a copy of
the same number of bytes in the same run. A variant is timed only if its result is ours.
"""

import contextlib
import datetime
import functools
import itertools
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE)]

import arguments  # noqa: E402  (beside this file)
import report  # noqa: E402
import rivals  # noqa: E402

REPEATS = 12  # of each variant; three variants have six orders
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}  # of two results of one case; a wrong one is 1 apart


@dataclass
class Case:
    """One row of the table. `calls` maps a variant ("redline", "eager", "compile", a rival) to a
    function of one input set; `make` draws an input set; `bytes` is what the op cannot avoid
    moving; `random`: two calls differ, so that results cannot be compared.

    `floor`: variants that run the op's unavoidable steps alone (its products by torch.mm); where
    all were timed the floor is their sum, "copy" being one of `bytes`. `clock`, on CUDA: "graph",
    without the host; "calls", one by one; "host", until one returns. `kept` counts the bytes kept
    for backward, `peak` those at most beside inputs and gradients; `moved`: all bytes, where
    `bytes` are those beside a product."""

    name: str
    direction: str
    shape: str
    dtype: str
    bytes: int
    make: Callable[[], tuple]
    calls: dict[str, Callable]
    flops: float = 0
    random: bool = False
    floor: tuple[str, ...] = ("copy", "products")
    clock: str = "graph"
    kept: dict[str, Callable[[], int]] = field(default_factory=dict)
    peak: dict[str, Callable[[], int]] = field(default_factory=dict)
    moved: int = 0
    times: dict[str, tuple[float, float]] = field(default_factory=dict)  # variant: (us, spread)
    not_timed: dict[str, str] = field(default_factory=dict)  # variant: reason


def both_directions(case, forwards, parameters=(), outputs=1):
    """Two cases from a sketch of one: `forwards` without derivatives, and their backward. `bytes`
    is a pair; `make` takes a bool: whether to draw the upstream gradients too, the last `outputs`
    tensors. One graph per input set is built on first use."""

    def backward_of(forward):
        graphs = {}

        def call(*given):
            inputs, upstream = given[:-outputs], given[-outputs:]
            if inputs[0] not in graphs:
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                graphs[inputs[0]] = (forward(*leaves), leaves)
            y, leaves = graphs[inputs[0]]
            ys = (y,) if outputs == 1 else y
            return torch.autograd.grad(ys, (*leaves, *parameters), upstream, retain_graph=True)

        return call

    make, (forward_bytes, backward_bytes) = case.make, case.bytes
    for direction, size, calls in (
        ("fwd", forward_bytes, {name: torch.no_grad()(call) for name, call in forwards.items()}),
        ("bwd", backward_bytes, {name: backward_of(call) for name, call in forwards.items()}),
    ):
        yield replace(
            case,
            direction=direction,
            bytes=size,
            make=functools.partial(make, direction == "bwd"),
            calls=calls,
            times={},
            not_timed={},
        )


def input_sets(case, device):
    """Enough sets to exceed the cache (60 MB of L2 on an H200, 32 MB assumed for a CPU); one where
    it is many caches long by itself."""
    cache = 128e6 if device == "cuda" else 64e6
    if case.bytes > 32 * cache:
        return [case.make()]
    return [case.make() for _ in range(int(min(8, max(2, cache // max(case.bytes, 1) + 1))))]


@functools.cache
def side_stream():
    """Results, warm-up and capture share a stream: autograd runs a backward on its forward's."""
    return torch.cuda.Stream()


def graph_of(call, sets):
    """One CUDA graph that runs the call on every set; outputs are freed inside the graph's pool."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets + sets[:1]:
            call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            call(*inputs)
    return graph


def cuda_timer(call, sets, captured=True, target_us=20000.0):
    """Not captured: calls one after the other, the host's time hidden only by long kernels."""
    replay = graph_of(call, sets).replay if captured else lambda: [call(*each) for each in sets]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(replays):
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (replays * len(sets))

    replays = max(1, int(target_us / (once(2) * len(sets))))
    return lambda: once(replays)


def cpu_timer(call, sets, turns, captured=False):
    """`turns` cycles through the sets for all variants: the one before left another in cache."""
    for inputs in sets:
        call(*inputs)

    def once():
        inputs = next(turns)
        begin = time.perf_counter()
        call(*inputs)
        return (time.perf_counter() - begin) * 1e6

    return once


def host_timer(call, sets, captured=False, calls=100):
    """Until a call returns; so many that the device's queue takes them all."""
    turns = itertools.cycle(sets)

    def once():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for inputs in itertools.islice(turns, calls):
            call(*inputs)
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent * 1e6 / calls

    once()
    return once


def timer_for(device, sets, clock="graph"):
    if device == "cuda":
        return functools.partial(host_timer if clock == "host" else cuda_timer, sets=sets)
    return functools.partial(cpu_timer, sets=sets, turns=itertools.cycle(sets))


def copy_call(device, size, pairs=1):
    """A copy that moves `size` bytes in all, read and written, another pair of buffers each call.

    By an elementwise kernel: a captured `copy_` becomes a memcpy node, and one of 4 GB ran at 2.7
    TB/s on an H200 where a kernel's runs at 4.3.
    """
    sources = [torch.randn(max(1, size // 8), device=device) for _ in range(pairs)]
    buffers = itertools.cycle([(source, torch.empty_like(source)) for source in sources])

    def call(*_):
        source, target = next(buffers)
        torch.neg(source, out=target)

    return call


def empty_kernels(call):
    """As many kernels that do nothing as a call launches: what its launches alone take."""

    @functools.cache
    def launches(inputs):
        call(*inputs)  # the first of a backward makes its graph
        recorder = torch.classes.redline.Recorder()
        recorder.start()
        call(*inputs)
        recorder.stop()
        return len(recorder.launches())

    def run(*inputs):
        for _ in range(launches(inputs)):
            torch.cuda._sleep(0)

    return run


def results_of(call, inputs, device):
    """Copies of what a call gives: the next may write over them."""
    cuda = device == "cuda"
    if cuda:
        side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()) if cuda else contextlib.nullcontext():
        given = call(*inputs)
        given = given if isinstance(given, (tuple, list)) else (given,)
        results = [tensor.detach().clone() for tensor in given if tensor is not None]
    if cuda:
        torch.cuda.synchronize()
    return results


def difference(ours, theirs, tolerance):
    """Why two results are not the same one, or None. Norms find what every element has, the largest
    element what few have; in pieces, for logits of gigabytes."""
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return f"gives {[tuple(x.shape) for x in theirs]}, not {[tuple(x.shape) for x in ours]}"
    for number, (expected, got) in enumerate(zip(ours, theirs)):
        squares, tops = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for x, y in zip(expected.flatten().split(2**26), got.flatten().split(2**26)):
            if not y.isfinite().all() and x.isfinite().all():
                return f"result {number} is not finite"
            for i, part in enumerate((y.float() - x.float(), x.float())):
                squares[i] += part.square().sum(dtype=torch.float64).cpu()
                tops[i] = torch.maximum(tops[i], part.abs().max().cpu())
        apart = max((squares[0] / squares[1]).sqrt().item(), (tops[0] / tops[1]).item() / 4)
        if squares[0] > 0 and not apart <= tolerance:
            return f"result {number} is {apart:.1e} of ours apart, more than {tolerance:.0e}"


def check(case, inputs, device):
    """Takes out of `case.calls` what fails or gives another result than ours; a floor's steps give
    none that could be compared."""
    kept = [tensor.detach().clone() for tensor in inputs]
    ours = results_of(case.calls["redline"], inputs, device)
    for name in [name for name in case.calls if name not in ("redline", *rivals.STEPS)]:
        for tensor, copy in zip(inputs, kept):
            tensor.data.copy_(copy)  # .data: graphs that were kept stay valid
        try:
            theirs = results_of(case.calls[name], inputs, device)
            reason = difference(ours, theirs, TOLERANCE[case.dtype.split()[0]])
        except Exception as error:
            reason = rivals.short(error)
        if reason is not None:
            case.not_timed[name] = reason
            del case.calls[name]
    for tensor, copy in zip(inputs, kept):
        tensor.data.copy_(copy)


def measure(case, device):
    """Interleaved medians of ours and of every variant whose result is ours."""
    torch._dynamo.reset()  # its limit of 8 recompilations would turn "compile" into eager, unsaid
    sets = input_sets(case, device)
    if not case.random:
        check(case, sets[0], device)
    make_timer = timer_for(device, sets, case.clock)
    timers = {}
    for name, call in {"copy": copy_call(device, case.bytes, len(sets)), **case.calls}.items():
        captured = case.clock == "graph" and (name, case.name) not in rivals.NOT_CAPTURED
        try:
            timers[name] = make_timer(call, captured=captured)
        except Exception as error:
            if name == "redline":
                raise
            case.not_timed[name] = rivals.short(error)
    samples = {name: [] for name in timers}
    orders = itertools.cycle(itertools.permutations(timers))  # nobody always follows the copy
    for _ in range(REPEATS):
        for name in next(orders):
            samples[name].append(timers[name]())
    for name, values in samples.items():
        values.sort()
        median = values[len(values) // 2]
        case.times[name] = (median, (values[-2] - values[1]) / median)


def row_of(case, rates):
    copy_us = case.times["copy"][0]
    if {*case.floor} <= {*case.times}:
        floor_us = sum(case.times[name][0] for name in case.floor)
    else:
        floor_us = max(copy_us, case.flops / rates["gemm_tflop_s"] / 1e6 if case.flops else 0.0)
    ours, spread = case.times["redline"]
    row = {
        "name": case.name,
        "direction": case.direction,
        "shape": case.shape,
        "dtype": case.dtype,
        "time_us": ours,
        "spread": spread,
        "floor_us": floor_us,
        "of_redline": floor_us / ours,
        "gb_s": (case.moved or case.bytes) / ours / 1e3,
        "tflop_s": case.flops / ours / 1e6,
        "rivals": {k: v[0] for k, v in case.times.items() if k not in ("redline", "copy")},
        "not_timed": case.not_timed,
    }
    for key, counts in (("kept_bytes", case.kept), ("peak_bytes", case.peak)):
        if counted := {name: count() for name, count in counts.items() if name in case.times}:
            row[key] = counted
    return row


def ceilings(device):
    """Large copy (GB/s) and bf16 (CPU: float32) matrix product (TFLOP/s) of this machine."""
    size, n = (2**32, 8192) if device == "cuda" else (2**28, 2048)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    copy = Case("copy", "", "", "", size, lambda: (), {"redline": lambda: None})
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for call in (copy_call(device, copy.bytes), lambda: a @ b):
        once = timer_for(device, [()])(call)
        times.append(sorted(once() for _ in range(5))[2])
    return {"copy_gb_s": size / times[0] / 1e3, "gemm_tflop_s": 2 * n**3 / times[1] / 1e6}


def text(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def machine(device, commit):
    root = str(pathlib.Path(__file__).parent.parent)
    gpu = device == "cuda"
    driver = text(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "gpu": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "driver": driver if gpu else "",
        "commit": commit or text(["git", "-C", root, "rev-parse", "--short", "HEAD"]),
        "command": "python bench/bench.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
    }


def main():
    if arguments.told(sys.argv[1:]):
        return
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    args = arguments.parsed(sys.argv[1:], known, __doc__.split("\n\n")[0])
    result = {**machine(args.device, args.commit), **ceilings(args.device), "rows": []}
    if args.rivals:
        result["rivals"] = rivals.load()
    print(
        f"{result['gpu']}: copy {result['copy_gb_s']:.0f} GB/s, product "
        f"{result['gemm_tflop_s']:.0f} TFLOP/s"
    )
    print(report.HEADER)
    for op in args.ops or known:
        for case in arguments.chosen(op, args):
            measure(case, args.device)
            result["rows"].append(row_of(case, result))
            print(report.line(result["rows"][-1]), flush=True)
            case.make = case.calls = case.kept = case.peak = None  # frees what the calls hold
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1))
        if args.markdown:
            pathlib.Path(args.markdown).write_text(report.markdown(result))
    if not result["rows"]:
        arguments.refuse("no row was asked for: --rows, --only and the ops leave none")


if __name__ == "__main__":
    main()
