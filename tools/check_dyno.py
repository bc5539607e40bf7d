#!/usr/bin/env python3
"""Fails where a dyno.json lacks a key, or holds what cannot be.

check_dyno.py dyno/dyno.json --steps 5
"""

import argparse
import json
import math
import sys
from pathlib import Path

tops = ("machine", "versions", "ceilings", "parts", "lap", "block")
always = ("stock_us", "tuned_us")  # the other numbers of a part may be null: not measured
sometimes = (
    "compiled_us",
    "spread",
    "stock_saved_bytes",
    "compiled_saved_bytes",
    "tuned_saved_bytes",
    "stock_error",
    "compiled_error",
    "tuned_error",
    "of_redline",
)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def faults_of_part(where: str, part: dict) -> list[str]:
    names = ("name", "direction", "shape", "dtype", *always, *sometimes)
    faults = [f"{where}.{name}: missing" for name in names if name not in part]
    for name in always:
        if name in part and not (is_number(part[name]) and part[name] > 0):
            faults.append(f"{where}.{name}: expected a number above 0, not {part[name]!r}")
    for name in sometimes:
        value = part.get(name)
        if value is not None and not (is_number(value) and value >= 0):
            faults.append(f"{where}.{name}: expected a number, not {value!r}")
    return faults


def faults_of_run(where: str, run: dict, steps: int | None) -> list[str]:
    names = ("losses", "tokens_per_second", "peak_bytes", "flop_utilisation")
    faults = [f"{where}.{name}: missing" for name in names if name not in run]
    losses = run.get("losses", [])
    if steps is not None and len(losses) != steps:
        faults.append(f"{where}.losses: expected {steps}, not {len(losses)}")
    if not all(is_number(loss) for loss in losses):
        faults.append(f"{where}.losses: not finite")
    for name in names[1:]:
        if name in run and not (is_number(run[name]) and run[name] > 0):
            faults.append(f"{where}.{name}: expected a number above 0, not {run[name]!r}")
    return faults


def faults_of_lap(lap: dict, steps: int | None) -> list[str]:
    names = ("stock", "tuned", "max_loss_difference", "bound")
    faults = [f"lap.{name}: missing" for name in names if name not in lap]
    for name in ("stock", "tuned"):
        faults += faults_of_run(f"lap.{name}", lap.get(name, {}), steps)
    difference, bound = lap.get("max_loss_difference"), lap.get("bound")
    if is_number(difference) and is_number(bound):
        if difference > bound:
            faults.append(f"lap.max_loss_difference: expected at most {bound}, not {difference}")
    else:
        faults.append("lap: max_loss_difference and bound: expected numbers")
    return faults


def faults_of_block(block: dict) -> list[str]:
    faults = []
    for side in ("stock", "tuned"):
        for name in ("time_us", "kernels", "saved_bytes"):
            value = block.get(side, {}).get(name)
            if not (is_number(value) and value > 0):
                faults.append(f"block.{side}.{name}: expected a number above 0, not {value!r}")
    return faults


def check(path: Path, steps: int | None = None) -> list[str]:
    """What is wrong with a report, in words."""
    report = json.loads(path.read_text())
    faults = [f"{name}: missing" for name in tops if name not in report]
    if not report.get("parts"):
        faults.append("parts: empty")
    for index, part in enumerate(report.get("parts", [])):
        faults += faults_of_part(f"parts[{index}]", part)
    faults += faults_of_lap(report.get("lap", {}), steps)
    return faults + faults_of_block(report.get("block", {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?", default=Path("dyno/dyno.json"))
    parser.add_argument("--steps", type=int, help="how many losses each run must have")
    options = parser.parse_args()
    found = check(options.path, options.steps)
    print("\n".join(f"{options.path}: {fault}" for fault in found) or f"{options.path}: whole")
    sys.exit(bool(found))
