"""Bytes that our kernels move to and from memory, by the profiler's counters, beside those that the
op cannot avoid: the cells of the memory-bound targets, each once, after a warm-up.

    PYTHONPATH=python python bench/bytes_moved.py [--rows REGEX] [--seconds N] --json F --markdown F

Runs itself under ncu (Nsight Compute). Caches are left as they are: what a kernel leaves in them to
be written back, the one before it left to this one, of other inputs. The small norms lie in the
cache and are left out.
"""

import argparse
import csv
import glob
import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch

sys.path[:0] = [str(pathlib.Path(__file__).parent)]

import arguments  # noqa: E402  (beside this file)
import bench  # noqa: E402
import targets  # noqa: E402

METRICS = {
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "registers": "launch__registers_per_thread",
    "instructions": "smsp__inst_executed.sum",
}
UNITS = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
MARKER = "spin_kernel"  # torch.cuda._sleep's, behind each cell
OPS = (
    *("norm", "gated_activation", "activation", "rotary", "cross_entropy", "bias_dropout_add"),
    *("softmax", "embedding", "adamw"),
)


def find_ncu():
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    every = (None, "/usr/local/cuda/bin", *places)
    return next(filter(None, (shutil.which("ncu", path=place) for place in every)), None)


def wanted_cells():
    memory = targets.TABLES["Memory-bound parts"]
    return {cell for t in memory if t.measure == "redline" for cell in t.cells()}


def profiled(case, device):
    """Runs a case's call, and alone of its runs the last is profiled."""
    call, sets = case.calls["redline"], bench.input_sets(case, device)
    for inputs in sets * 2:
        call(*inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(*sets[0])
    torch.cuda._sleep(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_cells(rows, seconds, target, device="cuda"):
    """Writes which cells were run, in order, and which the time did not suffice for."""
    begin, cells = time.monotonic(), wanted_cells()
    found = {"cells": [], "left_out": []}
    for op in OPS:
        for case in importlib.import_module(f"bench_{op}").cases(device):
            cell = (case.name, case.direction, case.shape, case.dtype)
            if cell not in cells or not rows.search(" ".join(cell)):
                continue
            late = time.monotonic() - begin > seconds
            found["left_out" if late else "cells"].append([*cell, case.bytes])
            if not late:
                profiled(case, device)
    pathlib.Path(target).write_text(json.dumps(found))


def kernels_in(log):
    """Name and counters of each kernel, from ncu's raw page as CSV, whose second line has units."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    reader = csv.DictReader(lines)
    units = next(reader, {})
    for row in reader:
        yield (
            row["Kernel Name"],
            {
                key: float(row[metric].replace(",", "")) * UNITS.get(units[metric], 1)
                for key, metric in METRICS.items()
            },
        )


def rows_of(cells, kernels):
    """One row per cell: the sums over its kernels, which end with a marker."""
    groups = [[]]
    for name, counters in kernels:
        if MARKER in name:
            groups.append([])
        else:
            groups[-1].append(counters)
    if len(groups) - 1 != len(cells):
        arguments.refuse(f"ncu counted {len(groups) - 1} cells of {len(cells)}")
    for (name, direction, shape, dtype, unavoidable), group in zip(cells, groups):
        sums = {key: sum(each[key] for each in group) for key in ("read", "written")}
        yield {
            "name": name,
            "direction": direction,
            "shape": shape,
            "dtype": dtype,
            "bytes": unavoidable,
            "bytes_read": sums["read"],
            "bytes_written": sums["written"],
            "kernels": len(group),
            "registers": max((int(each["registers"]) for each in group), default=0),
            "instructions": sum(each["instructions"] for each in group),
        }


def markdown(result):
    lines = [
        f"# {result['gpu']}: bytes moved",
        "",
        f"`{result['command']}` at {result['commit']}, torch {result['torch']}, driver "
        f"{result['driver']}, {result['date']}. In MB; *moved*: read and written, of the bytes "
        "that the op cannot avoid. Registers: the most of its kernels; instructions: of warps, in "
        "millions.",
        "",
        "| op | direction | shape | dtype | cannot avoid | read | written | moved | kernels "
        "| registers | instructions |",
        "|" + "---|" * 11,
    ]
    for row in result["rows"]:
        moved = (row["bytes_read"] + row["bytes_written"]) / row["bytes"]
        lines.append(
            f"| {row['name']} | {row['direction']} | {row['shape']} | {row['dtype']} "
            f"| {row['bytes'] / 1e6:,.1f} | {row['bytes_read'] / 1e6:,.1f} "
            f"| {row['bytes_written'] / 1e6:,.1f} | {moved:.3f} | {row['kernels']} "
            f"| {row['registers']} | {row['instructions'] / 1e6:,.1f} |"
        )
    if result["left_out"]:
        names = "; ".join(" ".join(cell[:3]) for cell in result["left_out"])
        lines += ["", f"Left out for want of time: {names}."]
    return "\n".join(lines) + "\n"


def counted(args):
    """The result of a run of itself under ncu."""
    ncu = find_ncu()
    if ncu is None:
        arguments.refuse("there is no ncu, on PATH or where Nsight Compute is installed")
    with tempfile.TemporaryDirectory() as folder:
        log, cells = pathlib.Path(folder, "ncu.csv"), pathlib.Path(folder, "cells.json")
        options = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        options += ["--profile-from-start", "off", "--target-processes", "all"]
        options += ["--cache-control", "none", "--clock-control", "none"]
        options += ["--metrics", ",".join(METRICS.values())]
        itself = [sys.executable, __file__, "--rows", args.rows.pattern]
        itself += ["--seconds", str(args.seconds), "--cells", str(cells)]
        status = subprocess.run([ncu, *options, *itself]).returncode
        text = log.read_text() if log.exists() else ""
        if status or not cells.exists():
            print(text[-2000:], file=sys.stderr)
            arguments.refuse(f"ncu ended with {status}")
        found = json.loads(cells.read_text())
    rows = [*rows_of(found["cells"], kernels_in(text))]
    command = {"command": "python bench/bytes_moved.py " + " ".join(sys.argv[1:])}
    return bench.machine("cuda", args.commit) | command | {"rows": rows} | found


def main():
    parser = arguments.Parser(prog="bytes_moved.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=arguments.pattern, default="", help="as bench.py's")
    parser.add_argument("--seconds", type=float, default=60, help="for all cells, at most")
    parser.add_argument("--json", type=arguments.new_file)
    parser.add_argument("--markdown", type=arguments.new_file)
    parser.add_argument("--commit", help="of this tree, where it was copied without its .git")
    parser.add_argument("--cells", help=argparse.SUPPRESS)  # under ncu: run them, and say which
    args = parser.parse_args()
    if not torch.cuda.is_available():
        arguments.refuse("there is no CUDA device")
    if args.cells:
        return run_cells(args.rows, args.seconds, args.cells)
    result = counted(args)
    del result["cells"]
    text = markdown(result)
    print(text)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))
    if args.markdown:
        pathlib.Path(args.markdown).write_text(text)


if __name__ == "__main__":
    main()
