"""The plots: drawn once per theme for PNG, and once in CSS variables for the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .block import Block
from .lap import VARIANTS, Lap
from .measure import KINDS
from .parts import Row

# Each role has a colour of its own, so that the page can put a CSS variable in its place.
ROLES = ("ink", "soft", "line", "stock", "compiled", "tuned", "ceiling", *KINDS)
LIGHT = dict(zip(ROLES, (
    "#1a1c1e", "#62676c", "#dcdfe2", "#8a9097", "#b9a06a", "#0f766e", "#c8102e",
    "#475569", "#7c5c99", "#b45309"), strict=True))  # fmt: skip
DARK = dict(zip(ROLES, (
    "#eceef0", "#9aa1a8", "#33383d", "#79818a", "#a78f58", "#2dd4bf", "#ff5a67",
    "#7f93ad", "#a986c9", "#e58a3a"), strict=True))  # fmt: skip
WIDTH = 5.2  # inches: its text stays readable on a phone


def _style(colours: dict[str, str]) -> dict:
    return {
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "text.color": colours["ink"], "axes.labelcolor": colours["soft"],
        "xtick.color": colours["soft"], "ytick.color": colours["soft"],
        "axes.edgecolor": colours["line"], "grid.color": colours["line"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "font.size": 10, "font.family": "DejaVu Sans", "legend.frameon": False,
        "svg.fonttype": "path", "svg.hashsalt": "redline",
    }  # fmt: skip


def losses(lap: Lap, colours: dict[str, str]) -> Figure:
    """Both loss curves, and under them their difference against the bound."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    steps = range(1, lap.setup.steps + 1)
    stock, tuned = (lap.sides[v].losses for v in ("stock", "tuned"))
    top.plot(steps, stock, color=colours["stock"], linewidth=4.5, label="stock", alpha=0.75)
    top.plot(steps, tuned, color=colours["tuned"], linewidth=1.5, label="tuned")
    top.set_ylabel("loss")
    top.grid(axis="y", linewidth=0.6)
    top.legend(loc="upper right")
    differences = [max(difference, 1e-9) for difference in lap.loss_differences]
    bottom.semilogy(steps[-len(differences) :], differences, color=colours["tuned"], linewidth=1.5)
    bottom.axhline(lap.bound, color=colours["ceiling"], linewidth=1.2, linestyle=(0, (4, 2)))
    bottom.annotate(
        f"bound {lap.bound:g}", (1, lap.bound), (0, 4), textcoords="offset points",
        color=colours["ceiling"], fontsize=9, xycoords=("axes fraction", "data"), ha="right",
    )  # fmt: skip
    bottom.set_ylim(top=lap.bound * 12)
    bottom.set_xlabel("step")
    means = f"\nmean of {lap.mean_steps} steps" if lap.mean_steps > 1 else ""
    bottom.set_ylabel(f"difference{means}")
    return figure


def parts(rows: list[Row], colours: dict[str, str]) -> Figure:
    """A bar per part and direction: the share of the ceiling that tuned reaches, and the others."""
    shown = [row for row in rows if row.of_redline and not row.disturbed]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * max(len(shown), 2)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(shown):
        axes.barh(y, row.of_redline, height=0.56, color=colours["tuned"])
        for colour, marker in (("ink", "|"), ("compiled", "d")):
            median = row.median_us("stock" if colour == "ink" else colour)
            if median:
                axes.plot(
                    row.floor_us / median, y, marker, color=colours[colour],
                    markersize=11 if marker == "|" else 6, markeredgewidth=2.4,
                )  # fmt: skip
    axes.axvline(1, color=colours["ceiling"], linewidth=1.6)
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=8.5)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    widest = max([1.0] + [row.of_redline for row in shown])
    axes.set_xlim(0, 1.06 * widest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("of redline")
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    return figure


def _label(row: Row) -> str:
    return {"forward": row.name, "step": row.name}.get(row.direction, f"{row.name}  + backward")


def saved(rows: list[Row], colours: dict[str, str]) -> Figure:
    """What each part keeps for backward, stock and tuned, in MB."""
    shown = [row for row in rows if row.saved.get("tuned") is not None]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.38 * max(len(shown), 2)), layout="constrained")
    axes = figure.subplots()
    for offset, variant in ((-0.19, "stock"), (0.19, "tuned")):
        axes.barh(
            [y + offset for y in range(len(shown))],
            [row.saved[variant] / 1e6 for row in shown],
            height=0.36, color=colours[variant], label=variant,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=8.5)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xlabel("MB kept for backward")
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper right")
    return figure


def block(found: Block, colours: dict[str, str]) -> Figure:
    """What runs when in one block: a lane for stock above one for tuned, on one scale."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    for lane, variant in enumerate(VARIANTS):
        side = found.sides[variant]
        for kind in KINDS:
            bars = [(s.start_us / 1e3, s.time_us / 1e3) for s in side.spans if s.kind == kind]
            axes.broken_barh(
                bars,
                (lane - 0.3, 0.6),
                facecolor=colours[kind],
                linewidth=0,
                label=None if lane else f"the {kind}" if kind == "rest" else kind,
            )
        for x, what in ((side.forward_us, "forward"), (side.time_us, "backward")):
            axes.plot((x / 1e3, x / 1e3), (lane - 0.42, lane + 0.42),
                      color=colours["ink"], linewidth=1)  # fmt: skip
            axes.annotate(f"{what} ends", (x / 1e3, lane - 0.42), (-2, 1), ha="right", fontsize=8,
                          textcoords="offset points", color=colours["soft"])  # fmt: skip
    axes.set_yticks(range(len(VARIANTS)), VARIANTS)
    axes.set_ylim(len(VARIANTS) - 0.5, -0.72)
    figure.legend(loc="outside upper center", ncols=len(KINDS), handlelength=1, handleheight=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds")
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    return figure


def draw(make: Callable, colours: dict[str, str], form: str, paper: str = "none") -> bytes:
    stream = io.BytesIO()
    with matplotlib.rc_context(_style(colours)):
        options = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 200}
        make(colours).savefig(stream, format=form, facecolor=paper, **options)
    return stream.getvalue()


def themed_svg(name: str, make: Callable[[dict[str, str]], Figure]) -> str:
    """An SVG for the page whose colours are CSS variables, so that one serves light and dark."""
    svg = draw(make, LIGHT, "svg").decode()
    svg = svg[svg.index("<svg") :]
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids are page-wide
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[\d.]+pt"', "", svg, count=1)
    )


def write_pngs(folder: Path, figures: dict[str, Callable]) -> None:
    for name, make in figures.items():
        for suffix, colours, paper in (("", LIGHT, "#ffffff"), ("-dark", DARK, "#121416")):
            (folder / f"{name}{suffix}.png").write_bytes(draw(make, colours, "png", paper))
