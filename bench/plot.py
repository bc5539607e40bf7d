"""The picture of a result: each row's share of the ceiling, ours and the others'."""

import pathlib

SMALL_US = 10.0  # rows whose floor is shorter are drawn hollow: a launch is most of their time
FORWARD = ("fwd", "step", "coeff", "scale", "norm")
COLOURS = {
    "eager": "#b0b0b0",
    "compile": "#7aa6c2",
    "liger": "#e09f3e",
    "quack": "#5f9e6e",
    "te": "#8e6bb0",
    "apex": "#a0665f",
    "index_add": "#d9b8c4",
}
OURS = "#c1121f"
MOST = 1.3  # of redline: what lies beyond is drawn at the edge, with its number


def shares(row):
    """The floor over each rival's time: what `of_redline` is for ours. The steps of a floor, such
    as bare products, are none."""
    times = row["rivals"].items()
    return {name: row["floor_us"] / time for name, time in times if name in COLOURS}


def dot(axes, share, place, *, color, small, **style):
    face = "none" if small else color
    axes.plot(min(share, MOST), place, color=color, markerfacecolor=face, **style)
    if share > MOST:
        axes.annotate(f"{share:.1f} ", (MOST, place), ha="right", va="center", fontsize=7)


def panel(axes, rows, names):
    """A line per op; a dot per size and variant; the ceiling at 1."""
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.annotate("ceiling", (0.99, -0.75), ha="right", fontsize=8)
    for row in rows:
        small = row["floor_us"] < SMALL_US
        place = names.index(row["name"])
        theirs = shares(row)
        for offset, (rival, share) in enumerate(theirs.items(), 1):
            spot = place + 0.6 * offset / (len(theirs) + 1)
            dot(axes, share, spot, color=COLOURS[rival], marker="o", markersize=3, small=small)
        dot(axes, row["of_redline"], place, color=OURS, marker="D", markersize=4.5, small=small)
    axes.set_xlim(0, MOST + 0.02)
    axes.set_ylim(len(names) - 0.2, -1.4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="both", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("of redline")


def legend(figure, rivals):
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="D", linestyle="", color=OURS, label="Redline")]
    for rival in rivals:
        marks.append(Line2D([], [], marker="o", linestyle="", color=COLOURS[rival], label=rival))
    hollow = {"marker": "D", "linestyle": "", "color": OURS, "markerfacecolor": "none"}
    marks.append(Line2D([], [], **hollow, label=f"floor under {SMALL_US:.0f} µs"))
    figure.legend(handles=marks, loc="upper center", ncols=len(marks), frameon=False, fontsize=9)


def draw(result, target):
    """Writes the picture of a result to `target`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "redline"  # the same file from the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    rivals = list(dict.fromkeys(name for row in result["rows"] for name in shares(row)))
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(12, 1.6 + 0.27 * len(names)))
    for side, title in zip(axes, ("forward, and one-way ops", "backward, or both ways together")):
        forward = side is axes[0]
        panel(side, [r for r in result["rows"] if (r["direction"] in FORWARD) == forward], names)
        side.set_title(title, fontsize=10)
    legend(figure, rivals)
    head = 1 - 0.35 / figure.get_figheight()
    foot = (
        "of redline: the time of a copy of the same bytes, or of the product, over the op's.   "
        f"{result['gpu']}, commit {result['commit']}, torch {result['torch']}, "
        f"copy {result['copy_gb_s']:.0f} GB/s"
    )
    figure.text(0.5, 0.004, foot, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.015, 1, head))
    target = pathlib.Path(target)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=100)
    pyplot.close(figure)
