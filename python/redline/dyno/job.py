"""The whole job, phase by phase, with a progress bar in each long one."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import DEVICES, DTYPES, Options, addresses, machine, report
from .block import RUNS, measure_block
from .catalogue import CATALOGUE
from .lap import SHORT_LAP, Setup, run_lap
from .measure import DynoError
from .part import Setting
from .parts import VARIANTS, Row, measure_parts
from .stock import Shape
from .text import Batches, learn, read_text

LEARNING_SEED = 0
# At 1e-3 a rounding grows until the curves tell nothing (lap.py, BOUNDS): on a GPU's model within
# 40 steps, on the CPU's in more than these.
CALM_RATE = 3e-4
SHORT = {"forward": "fwd", "forward+backward": "both"}


def choose(options: Options) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the options name, or one clear line."""
    if options.device not in DEVICES:
        raise DynoError(f"--device: expected {' '.join(DEVICES)}, not {options.device}")
    if options.dtype not in DTYPES:
        raise DynoError(f"--dtype: expected {' '.join(DTYPES)}, not {options.dtype}")
    if options.steps < 1:
        raise DynoError(f"--steps: expected at least 1, not {options.steps}")
    if options.compile_parts < 0:
        raise DynoError(f"--compile-parts: expected 0 or more, not {options.compile_parts}")
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise DynoError("--device: cuda: torch sees no GPU here; `redline doctor` says why")
    device = torch.device("cuda" if options.device == "cuda" or (options.device == "auto" and cuda)
                          else "cpu")  # fmt: skip
    name = DTYPES[options.dtype] or ("bfloat16" if device.type == "cuda" else "float32")
    return device, getattr(torch, name)


def shape_for(device: torch.device, steps: int) -> Shape:
    if device.type == "cuda":
        return Shape(
            hidden=2048,
            ffn=5632,
            layers=8,
            heads=16,
            kv_heads=4,
            sequence=2048,
            batch=4,
            learning_rate=CALM_RATE,
        )
    return Shape() if steps <= SHORT_LAP else Shape(learning_rate=CALM_RATE)


def run_job(options: Options) -> int:
    device, dtype = choose(options)
    text = read_text(options.text)  # what it refuses stands alone: no bar is on the screen yet
    console = Console(stderr=False)
    allocator = machine.set_allocator()
    _quiet_torch()
    torch.manual_seed(LEARNING_SEED)
    with report.aside(options.out) as folder:
        with _progress(console) as progress:
            result = _measure(options, (device, dtype, text), allocator, progress)
        report.write(result, folder)
    _print(console, result, options)
    return 0 if result.lap.right else 1


def _quiet_torch() -> None:
    # One compiling process: a pool of them would run beside the clocks.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    warnings.filterwarnings("ignore", module=r"torch\..*")
    if not torch.cuda.is_available():
        # The profiler counts GPUs and torch.compile looks for a toolkit; what they report of a
        # machine without a GPU concerns nothing that is run here.
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console)


def _measure(options: Options, target: tuple, allocator: str, progress: Progress) -> report.Result:
    device, dtype, text = target
    shape = shape_for(device, options.steps)
    task = progress.add_task("learning the text", total=1)
    corpus = learn(*text, shape.vocabulary)
    batches = Batches(corpus, shape.batch, shape.sequence, LEARNING_SEED)
    progress.advance(task)

    setup = Setup(shape, device, dtype, options.steps)
    lap_task = progress.add_task("the lap: stock and tuned", total=options.steps)
    lap = run_lap(setup, batches, lambda step: progress.update(lap_task, completed=step + 1))

    setting = Setting.for_device(device, dtype)
    block_task = progress.add_task("the block: stock and tuned", total=RUNS)
    block = measure_block(setting, lambda: progress.advance(block_task))
    progress.update(block_task, completed=RUNS)

    parts_task = progress.add_task("the parts", total=len(CATALOGUE))

    def on_part(part: str) -> None:
        progress.update(parts_task, description=f"the parts: {part}")
        progress.advance(parts_task)

    ceilings = machine.measure_ceilings(device, dtype)
    rows = measure_parts(setting, options.compile_parts, on_part)
    ceilings = ceilings.raised_by(machine.measure_ceilings(device, dtype))
    for row in rows:
        row.hold_against(ceilings)
    return report.Result(
        machine=machine.describe_machine(device, allocator),
        versions=machine.describe_versions(options.command),
        ceilings=ceilings,
        rows=rows,
        lap=lap,
        block=block,
        corpus=corpus,
        addresses=addresses.compare(device, dtype),
    )


def _print(console: Console, result: report.Result, options: Options) -> None:
    console.print(_parts_table(result.rows))
    console.print(_whole_table(result))
    answers = Table(box=None, show_header=False)
    for headline in report.headlines(result.lap):
        answers.add_row(headline.question, f"[bold]{headline.answer}[/]", headline.detail)
    console.print(answers)
    console.print(f"{options.out / 'report.html'}  {options.out / 'dyno.json'}")


def _parts_table(rows: list[Row]) -> Table:
    """A row per part and direction, 80 columns wide."""
    table = Table(title="parts: median milliseconds", title_justify="left",
                  box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fmt: skip
    table.add_column("part", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    for column in (*VARIANTS, "speedup", "of redline"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        speedup = None if row.disturbed else row.speedup()
        share = None if row.disturbed else row.of_redline
        table.add_row(
            row.name,
            SHORT.get(row.direction, row.direction),
            *(_milliseconds(row.median_us(v)) for v in VARIANTS),
            f"{speedup:.2f}x" if speedup else "busy" if row.disturbed else "–",
            f"{share:.0%}" if share else "–",
        )
    return table


def _whole_table(result: report.Result) -> Table:
    """The lap's training, and one block of it alone."""
    table = Table(title="the lap, and one block forward and backward", title_justify="left",
                  box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("")
    unit = result.block.unit
    for column in ("tokens/s", "peak MB", "of FLOP/s", "block ms", unit, "kept MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for variant, side in result.block.sides.items():
        table.add_row(
            variant,
            f"{result.lap.tokens_per_second(variant):,.0f}",
            f"{result.lap.sides[variant].profile.peak_bytes / 1e6:,.0f}",
            f"{result.lap.flop_utilisation(variant, result.ceilings):.0%}",
            "busy" if result.block.disturbed else _milliseconds(side.time_us),
            f"{len(side.spans)}",
            f"{side.saved_bytes / 1e6:,.1f}",
        )
    return table


def _milliseconds(microseconds: float | None) -> str:
    """Three digits or more."""
    if microseconds is None:
        return "–"
    value = microseconds / 1e3
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"
