"""The report: one self-contained page, plots as PNG and dyno.json, written aside and renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2

from . import plots
from .addresses import Addresses
from .block import Block
from .lap import Lap
from .machine import Ceilings
from .measure import DynoError
from .parts import VARIANTS, Row
from .text import Corpus


@dataclass
class Result:
    machine: dict
    versions: dict
    ceilings: Ceilings
    rows: list[Row]
    lap: Lap
    block: Block
    corpus: Corpus
    addresses: Addresses

    def as_dict(self) -> dict:
        return {
            "machine": self.machine,
            "versions": self.versions,
            "ceilings": self.ceilings.as_dict(),
            "parts": [row.as_dict() for row in self.rows],
            "lap": self.lap.as_dict(self.ceilings),
            "block": self.block.as_dict(),
        }


@dataclass(frozen=True)
class Headline:
    question: str
    answer: str
    detail: str
    good: bool | None  # None: no claim


def headlines(lap: Lap) -> list[Headline]:
    return [_right(lap), _faster(lap), _smaller(lap)]


def _right(lap: Lap) -> Headline:
    means = f" in means of {lap.mean_steps} steps" if lap.mean_steps > 1 else ""
    detail = (
        f"largest loss difference {lap.max_loss_difference:.1e}{means} over {lap.setup.steps} "
        f"steps; the bound is {lap.bound:g}"
    )
    return Headline("Is it right?", "Yes" if lap.right else "No", detail, lap.right)


def _faster(lap: Lap) -> Headline:
    stock, tuned = (lap.tokens_per_second(v) for v in ("stock", "tuned"))
    detail = f"{tuned:,.0f} against {stock:,.0f} tokens/s, median after warm-up"
    if lap.disturbed:
        note = "other programs used the processor during most steps; run it again when it is quiet"
        return Headline("Is it faster?", "No claim", note, None)
    return Headline("Is it faster?", f"{lap.speedup:.2f}×", detail, lap.speedup > 1)


def _smaller(lap: Lap) -> Headline:
    stock, tuned = (lap.sides[v].profile.peak_bytes for v in ("stock", "tuned"))
    detail = f"allocator's peak {tuned / 1e6:,.0f} MB against {stock / 1e6:,.0f} MB"
    return Headline("Is it smaller?", f"{lap.peak_ratio:.2f}× the memory", detail, tuned < stock)


def figures(result: Result) -> dict:
    return {
        "losses": partial(plots.losses, result.lap),
        "parts": partial(plots.parts, result.rows),
        "saved": partial(plots.saved, result.rows),
        "block": partial(plots.block, result.block),
    }


def microseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:,.2f} ms" if value >= 1000 else f"{value:,.0f} µs"


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.1f}"


def render(result: Result) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"us": microseconds, "mb": megabytes}
    svgs = {name: plots.themed_svg(name, make) for name, make in figures(result).items()}
    disturbed = sorted({row.name for row in result.rows if row.disturbed})
    return environment.get_template("report.html").render(
        result=result,
        lap=result.lap,
        block=result.block,
        headlines=headlines(result.lap),
        svgs=svgs,
        variants=VARIANTS,
        disturbed=disturbed,
        light=dict(plots.LIGHT),
        dark=dict(plots.DARK),
    )


@contextmanager
def aside(out: Path):
    """A folder beside the results; what is in it at the end moves to `out`, file by file.

    Made before the work begins, so that a folder that cannot be written is told at once.
    """
    existed = out.exists()
    with _blaming(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".dyno-", dir=out))
    try:
        yield folder
        with _blaming(out):
            for file in sorted(folder.iterdir()):
                os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _blaming(out: Path):
    """An OSError of writing the results is --out's; one of the measuring is not."""
    try:
        yield
    except OSError as error:
        raise DynoError(f"--out: {out}: {error.strerror}; nothing was written") from None


def write(result: Result, folder: Path) -> None:
    page = render(result)
    data = json.dumps(result.as_dict(), indent=1, allow_nan=False)
    with _blaming(folder.parent):
        (folder / "dyno.json").write_text(data)
        (folder / "report.html").write_text(page, encoding="utf-8")
        plots.write_pngs(folder, figures(result))
