"""What is said of measured rows: a line, a Markdown table, and how two files compare."""

import functools

import reasons
import rivals
import targets

SAME = 0.02  # a smaller change than this is none

HEADER = (
    f"{'op':<34} {'':<11}{'shape':<26}{'dtype':<6}{'time us':>10}{'±':>6}{'floor us':>10}"
    f"{'of floor':>9}{'GB/s':>7}  rivals' time / ours"
)


def line(row):
    others = [f"{k} {v / row['time_us']:.2f}x" for k, v in row["rivals"].items()]
    refused = [f"{k} not timed: {v}" for k, v in row["not_timed"].items()]
    kept = [f"{k} keeps {v / 1e6:.1f} MB" for k, v in row.get("kept_bytes", {}).items()]
    kept += [f"{k} takes {v / 1e6:.1f} MB" for k, v in row.get("peak_bytes", {}).items()]
    return (
        f"{row['name']:<34} {row['direction']:<11}{row['shape']:<26}{row['dtype']:<6}"
        f"{row['time_us']:>10.1f}{row['spread']:>6.1%}{row['floor_us']:>10.1f}"
        f"{row['of_redline']:>9.2f}{row['gb_s']:>7.0f}  {'  '.join(others + kept + refused)}"
    )


def ahead(row, rival):
    """By more than the noise; a step of a floor and another form of ours are no rivals."""
    ratio = row["rivals"][rival] / row["time_us"]
    return rival not in rivals.PARTS and ratio < 1 - max(SAME, row["spread"])


def cell(row, rival):
    """Bold where the rival is ahead."""
    if rival not in row["rivals"]:
        return "*" if rival in row.get("not_timed", {}) else "–"
    ratio = row["rivals"][rival] / row["time_us"]
    return f"**{ratio:.2f}**" if ahead(row, rival) else f"{ratio:.2f}"


def rate(value):
    """A dash for what moves or multiplies next to nothing."""
    return f"{value:.0f}" if value >= 0.5 else "–"


def faults(rows):
    """One line per rival, op and reason; the shapes beside it."""
    found = {}
    for row in rows:
        for rival, reason in row.get("not_timed", {}).items():
            key = f"{rival}, {row['name']} {row['direction']}: {reason}"
            found.setdefault(key, []).append(row["shape"])
    return [f"* {key} ({'; '.join(shapes)})" for key, shapes in found.items()]


def behind(result):
    """One line per reason: every row where a rival is ahead."""
    reasoned = {}
    for row in result["rows"]:
        for rival in filter(functools.partial(ahead, row), row["rivals"]):
            why = reasons.find(result["gpu"], row, rival).link()
            rows = reasoned.setdefault(why, {})
            cells = rows.setdefault(f"`{row['name']}` {row['direction']}, {rival}", [])
            cells.append(f"{row['shape']} {row['rivals'][rival] / row['time_us']:.2f}")
    lines = ("; ".join(f"{row}: {', '.join(c)}" for row, c in r.items()) for r in reasoned.values())
    return [f"* {line}. Why: {why}" for line, why in zip(lines, reasoned, strict=True)]


def counted_bytes(rows, field):
    return [
        f"* {row['name']} {row['direction']}, {row['shape']}: "
        + ", ".join(f"{variant} {size / 1e6:,.1f}" for variant, size in row[field].items())
        for row in rows
        if field in row
    ]


def uncaptured(rows):
    """Which times hold the host's share."""
    found = {(rival, row["name"]) for row in rows for rival in row["rivals"]}
    return [
        f"{rival}'s {op} waits for the device within a call: timed by calls, not as a CUDA graph."
        for rival, op in sorted(found & rivals.NOT_CAPTURED)
    ]


def head(result):
    versions = ", ".join(f"{k} {v}" for k, v in result.get("rivals", {}).items())
    return [
        f"# {result['gpu']}",
        "",
        f"`{result['command']}` at {result['commit']}, torch {result['torch']}, driver "
        f"{result['driver']}, {result['date']}. Copy {result['copy_gb_s']:.0f} GB/s, product "
        f"{result['gemm_tflop_s']:.0f} TFLOP/s, both in this run. *Of redline*: the time of a copy "
        "of the same bytes over the op's. Rivals: their time over ours; above 1, ours is shorter, "
        "and bold where theirs is. The last columns are no rivals, but a floor's steps and other "
        "forms of ours." + (f" Rivals: {versions}." if versions else ""),
        "",
    ]


def table(rows):
    named = {name for row in rows for name in (*row["rivals"], *row.get("not_timed", {}))}
    names = sorted(named, key=lambda name: (name in rivals.PARTS, name))
    lines = [
        "| op | direction | shape | dtype | time µs | ± | floor µs | of redline | GB/s | TFLOP/s | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (10 + len(names)),
    ]
    for row in rows:
        cells = [cell(row, name) for name in names]
        lines.append(
            f"| {row['name']} | {row['direction']} | {row['shape']} | {row['dtype']} | "
            f"{row['time_us']:.1f} | {row['spread']:.1%} | {row['floor_us']:.1f} | "
            f"{row['of_redline']:.2f} | {rate(row['gb_s'])} | {rate(row['tflop_s'])} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def markdown(result):
    rows = result["rows"]
    lines = [*head(result), *targets.markdown(result)]
    if found := behind(result):
        lines += ["## Where a rival is ahead, and why", "", *found, ""]
    lines += ["## Every row", "", *table(rows)]
    if found := counted_bytes(rows, "kept_bytes"):
        lines += ["", "Kept for backward, in MB:", "", *found]
    if found := counted_bytes(rows, "peak_bytes"):
        lines += ["", "At most in use beside inputs and gradients, in MB:", "", *found]
    if result["driver"] and (found := uncaptured(rows)):
        lines += ["", *found]
    if found := faults(rows):
        lines += ["", "Not timed (`*`), because it failed or its result was not ours:", "", *found]
    return "\n".join(lines) + "\n"


def verdict(was, now):
    """The word and the ratio of `of_redline`: ratios travel between machines, microseconds do not.

    A change counts where it is more than both spreads together. A smaller one is "same" only where
    the spreads could not hide one of 2 %."""
    ratio = now["of_redline"] / was["of_redline"]
    noise = was["spread"] + now["spread"]
    if abs(ratio - 1) > max(noise, SAME):
        return ("faster" if ratio > 1 else "slower"), ratio
    return ("same" if noise <= SAME else "unclear"), ratio


def compare(before, after):
    """A line per row of either result, and how many of each word."""

    def rows(result):
        keys = ("name", "direction", "shape", "dtype")
        return {" ".join(row[key] for key in keys): row for row in result["rows"]}

    old, new = rows(before), rows(after)
    counts, lines = {}, []
    for key in dict.fromkeys((*old, *new)):
        if key in old and key in new:
            word, ratio = verdict(old[key], new[key])
            lines.append(f"{word:<8}{ratio:>6.2f}  {key}")
        else:
            word = "gone" if key in old else "new"
            lines.append(f"{word:<14}  {key}")
        counts[word] = counts.get(word, 0) + 1
    return [*lines, ", ".join(f"{count} {word}" for word, count in counts.items())]
