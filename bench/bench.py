"""Times an op against its floor and its rivals, the same way for all ops.

    PYTHONPATH=python python bench/bench.py [OP ...] [--json FILE] [--markdown FILE]
    PYTHONPATH=python python bench/bench.py compare BEFORE.json AFTER.json

Each ``bench_<op>.py`` states cases, the call, the fewest bytes it must move and its baselines.
Here: fresh random data in several input sets that together exceed the last cache, CUDA graphs of
many launches (CPU: single calls), variants interleaved, median and spread; the floor is a copy of
the same number of bytes in the same run.
"""

import argparse
import datetime
import functools
import importlib
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
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

REPEATS = 12  # of each variant; three variants have six orders


@dataclass
class Case:
    """One row of the table. `calls` maps a variant ("redline", "eager", "compile") to a function
    of one input set; `make` draws an input set; `bytes` is what the op cannot avoid moving."""

    name: str
    direction: str
    shape: str
    dtype: str
    bytes: int
    make: Callable[[], tuple]
    calls: dict[str, Callable]
    flops: float = 0
    times: dict[str, tuple[float, float]] = field(default_factory=dict)  # variant: (us, spread)


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
        )


def input_sets(case, device):
    """Enough sets to exceed the cache (60 MB of L2 on an H200, 32 MB assumed for a CPU)."""
    cache = 128e6 if device == "cuda" else 64e6
    return [case.make() for _ in range(int(min(8, max(2, cache // max(case.bytes, 1) + 1))))]


def graph_of(call, sets):
    """One CUDA graph that runs the call on every set; outputs are freed inside the graph's pool.

    Warm-up and capture share a stream: autograd runs a backward on its forward's stream.
    """
    stream = torch.cuda.Stream()
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


def cuda_timer(call, sets, target_us=20000.0):
    graph = graph_of(call, sets)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(replays):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (replays * len(sets))

    replays = max(1, int(target_us / (once(2) * len(sets))))
    return lambda: once(replays)


def cpu_timer(call, sets, turns):
    """`turns` cycles through the sets for all variants: the one before left another in cache."""
    for inputs in sets:
        call(*inputs)

    def once():
        inputs = next(turns)
        begin = time.perf_counter()
        call(*inputs)
        return (time.perf_counter() - begin) * 1e6

    return once


def timer_for(device, sets):
    if device == "cuda":
        return functools.partial(cuda_timer, sets=sets)
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


def measure(case, device):
    """Interleaved medians; a variant that fails is left out with its reason on stderr."""
    torch._dynamo.reset()  # its limit of 8 recompilations would turn "compile" into eager, unsaid
    sets = input_sets(case, device)
    make_timer = timer_for(device, sets)
    timers = {}
    for name, call in {"copy": copy_call(device, case.bytes, len(sets)), **case.calls}.items():
        try:
            timers[name] = make_timer(call)
        except Exception as error:
            if name == "redline":
                raise
            print(f"{case.name} {case.shape}: {name} not measured: {error}", file=sys.stderr)
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
    floor_us = max(copy_us, case.flops / rates["gemm_tflop_s"] / 1e6 if case.flops else 0.0)
    ours, spread = case.times["redline"]
    return {
        "name": case.name,
        "direction": case.direction,
        "shape": case.shape,
        "dtype": case.dtype,
        "time_us": ours,
        "spread": spread,
        "floor_us": floor_us,
        "of_redline": floor_us / ours,
        "gb_s": case.bytes / ours / 1e3,
        "tflop_s": case.flops / ours / 1e6,
        "rivals": {k: v[0] for k, v in case.times.items() if k not in ("redline", "copy")},
    }


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


def line(row):
    rivals = "  ".join(f"{k} {v / row['time_us']:.2f}x" for k, v in row["rivals"].items())
    return (
        f"{row['name']:<22}{row['direction']:<8}{row['shape']:<24}{row['dtype']:<6}"
        f"{row['time_us']:>10.1f}{row['spread']:>6.1%}{row['floor_us']:>10.1f}"
        f"{row['of_redline']:>8.2f}{row['gb_s']:>8.0f}  {rivals}"
    )


HEADER = (
    f"{'op':<22}{'':<8}{'shape':<24}{'dtype':<6}{'time us':>10}{'±':>6}{'floor us':>10}"
    f"{'of floor':>8}{'GB/s':>8}  rivals' time / ours"
)


def markdown(result):
    names = sorted({name for row in result["rows"] for name in row["rivals"]})
    lines = [
        f"# {result['gpu']}",
        "",
        f"`{result['command']}` at {result['commit']}, torch {result['torch']}, driver "
        f"{result['driver']}, {result['date']}. Copy {result['copy_gb_s']:.0f} GB/s, product "
        f"{result['gemm_tflop_s']:.0f} TFLOP/s, both in this run. *Of redline*: the time of a copy "
        "of the same bytes over the op's. Rivals: their time over ours; above 1, ours is shorter.",
        "",
        "| op | direction | shape | dtype | time µs | ± | floor µs | of redline | GB/s | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (9 + len(names)),
    ]
    for row in result["rows"]:
        cells = [
            f"{row['rivals'][name] / row['time_us']:.2f}" if name in row["rivals"] else "–"
            for name in names
        ]
        lines.append(
            f"| {row['name']} | {row['direction']} | {row['shape']} | {row['dtype']} | "
            f"{row['time_us']:.1f} | {row['spread']:.1%} | {row['floor_us']:.1f} | "
            f"{row['of_redline']:.2f} | {row['gb_s']:.0f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def compare(before, after):
    """same, faster, slower, or unclear where the spreads overlap a difference."""
    old, new = (json.loads(pathlib.Path(name).read_text()) for name in (before, after))
    key = lambda row: (row["name"], row["direction"], row["shape"], row["dtype"])  # noqa: E731
    known = {key(row): row for row in old["rows"]}
    for row in new["rows"]:
        if (was := known.get(key(row))) is None:
            continue
        ratio = row["of_redline"] / was["of_redline"]  # ratios travel; microseconds do not
        noise = max(row["spread"], was["spread"])
        change = abs(ratio - 1)
        verdict = (
            "same"
            if change < 0.02
            else "unclear"
            if change < noise
            else ("faster" if ratio > 1 else "slower")
        )
        print(f"{verdict:<8}{ratio:>6.2f}  {' '.join(key(row))}")


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare(*sys.argv[2:4])
    here = pathlib.Path(__file__).parent
    known = sorted(path.stem.removeprefix("bench_") for path in here.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", choices=[*known, []], help=f"of {', '.join(known)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--only", help="variants to time, by commas: redline,eager,compile")
    parser.add_argument("--quick", action="store_true", help="the first case of each op")
    parser.add_argument("--commit", help="of this tree, where it was copied without its .git")
    args = parser.parse_args()
    result = {**machine(args.device, args.commit), **ceilings(args.device), "rows": []}
    print(
        f"{result['gpu']}: copy {result['copy_gb_s']:.0f} GB/s, product "
        f"{result['gemm_tflop_s']:.0f} TFLOP/s"
    )
    print(HEADER)
    for op in args.ops or known:
        cases = importlib.import_module(f"bench_{op}").cases(args.device)
        for case in list(cases)[: 1 if args.quick else None]:
            if args.only:
                case.calls = {k: v for k, v in case.calls.items() if k in args.only.split(",")}
            measure(case, args.device)
            result["rows"].append(row_of(case, result))
            print(line(result["rows"][-1]), flush=True)
            case.make = case.calls = None  # frees the inputs that the calls hold
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1))
        if args.markdown:
            pathlib.Path(args.markdown).write_text(markdown(result))


if __name__ == "__main__":
    main()
