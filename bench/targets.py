"""What the published results are held to: the cells of the two tables of targets, and the verdict
of a result file on each of them; a short one is said with its reason of results/reasons.toml.

A target's measure is "redline" (the floor over our time), "kept" and "peak" (bytes), "empty" (our
time over that of as many empty kernels and the bytes), or a variant: its time over ours."""

import itertools
from dataclasses import dataclass

import reasons
import rivals

MANY = (
    "65536 x 1024", "32768 x 2048", "16384 x 4096", "16384 x 5120", "8192 x 8192", "4096 x 16384",
    "1024 x 65536",
)  # fmt: skip
NARROW = ("1048576 x 128", "262144 x 256")
SMALL = ("64 x 4096", "256 x 2048", "1 x 8192")
GATED = ("16384 x 14336", "16384 x 4096", "8192 x 1536")
HEADS = ("4 x 4096 x 32 (8) x 64", "4 x 4096 x 32 (8) x 128")
CLASSES = (32000, 50257, 100352, 128256, 151936, 152064, 201088, 262144)
LOGITS = tuple(f"8192 x {classes}" for classes in CLASSES)
PARAMETERS = ("300 x 1024 x 3488",)
WEIGHTS = (
    ("8B", ("4096 to 6144", "4096 to 4096", "4096 to 28672", "14336 to 4096")),
    ("70B", ("8192 to 10240", "8192 to 8192", "8192 to 57344", "28672 to 8192")),
)
PRODUCTS = tuple(
    f"{model} {tokens} x {weight}"
    for model, weights in WEIGHTS
    for tokens, weight in itertools.product((4096, 16384), weights)
)
LINEARS = ("16384 x 4096 to 6144", "16384 x 4096 to 4096")
MLP = ("16384 x 4096 by 14336",)
HEAD = ("8192 x 4096 x 128256",)
BLOCK = ("4 x 4096 x 4096, ffn 14336",)
KINDS = ("swiglu", "geglu", "reglu", "quick_geglu", "clamped_swiglu")
PLAIN_KINDS = ("gelu", "gelu_erf", "quick_gelu", "silu", "relu", "squared_relu")
NORMS, RESIDUAL = ("rms_norm", "layer_norm"), ("residual_rms_norm", "residual_layer_norm")
GATES = (
    *(f"gated_activation {kind}" for kind in KINDS),
    *(f"gated_activation_pair {kind}" for kind in ("swiglu", "geglu")),
    "gated_activation swiglu row_scale",
)
BIASED_GATES = ("gated_activation swiglu bias", "gated_activation clamped_swiglu bias row_scale")
BIASED = tuple(f"activation {kind} bias" for kind in PLAIN_KINDS)
ROTARY = ("rotary q, k", "qkv_rotary", "qkv_rotary_split")
SOFTMAX = ("softmax", "softmax causal", "softmax masked")


@dataclass(frozen=True)
class Target:
    """One number of a table for the rows of these names, directions, shapes and dtypes; `most`:
    the value may not be larger, where otherwise it may not be smaller."""

    what: str
    names: tuple[str, ...]
    directions: tuple[str, ...]
    shapes: tuple[str, ...]
    limit: float
    measure: str = "redline"
    most: bool = False
    dtypes: tuple[str, ...] = ("bf16",)

    def cells(self):
        return itertools.product(self.names, self.directions, self.shapes, self.dtypes)

    def wanted(self):
        unit = {
            "redline": "of redline",
            "kept": "of eager's kept bytes",
            "kept MB": "MB kept",
            "peak": "MB at most beside the gradients",
            "empty": "x as many empty kernels and the bytes",
            "products": "of the bare products",
        }.get(self.measure, f"x {self.measure}")
        return f"{'≤' if self.most else '≥'} {self.limit:g} {unit}"


def norms():
    for direction, narrow, rms, layer in (("fwd", 0.93, 0.97, 0.97), ("bwd", 0.87, 0.93, 0.90)):
        where = {"fwd": "forward", "bwd": "backward"}[direction]
        yield Target(f"norm, narrow, {where}", NORMS, (direction,), NARROW, narrow)
        for name, least in (("rms_norm", rms), ("layer_norm", layer)):
            yield Target(f"{name} {where}", (name,), (direction,), MANY, least)
        sizes = (*NARROW, *MANY)
        yield Target(f"norm of a residual, {where}", RESIDUAL, (direction,), sizes, rms)
    small = ("norm of few rows", (*NORMS, *RESIDUAL), ("fwd", "bwd"), SMALL)
    yield Target(*small, 1.3, "empty", most=True)


MEMORY = [
    *norms(),
    Target("gated_activation forward", (*GATES, *BIASED_GATES), ("fwd",), GATED, 0.97),
    Target("gated_activation backward", GATES, ("bwd",), GATED, 0.97),
    Target("gated_activation backward, bias gradient", BIASED_GATES, ("bwd",), GATED, 0.92),
    Target("activation + bias forward", BIASED, ("fwd",), ("16384 x 16384",), 0.97),
    Target("activation + bias backward", BIASED, ("bwd",), ("16384 x 16384",), 0.92),
    Target("rotary", ROTARY, ("fwd", "bwd"), HEADS, 0.93),
    Target("cross_entropy", ("cross_entropy",), ("fwd+bwd",), LOGITS, 0.94),
    Target("cross_entropy, promised", ("cross_entropy promised",), ("fwd+bwd",), LOGITS, 0.85),
    Target(
        *("bias_dropout_add", ("dropout_add", "bias_dropout_add"), ("fwd", "bwd")),
        *(("16384 x 4096",), 0.95),
    ),
    Target("softmax", SOFTMAX, ("fwd", "bwd"), ("2 x 32 x 2048 x 2048",), 0.93),
    Target(
        *("adamw_step", ("adamw_step",), ("step",), PARAMETERS, 0.93),
        dtypes=("f32", "bf16 master"),
    ),
    Target(
        *("clip_grad_norm, coefficient", ("clip_grad_norm",), ("coeff",), PARAMETERS, 0.95),
        dtypes=("f32", "bf16"),
    ),
    Target("embedding lookup", ("embedding",), ("fwd",), ("16384 of 128256 x 4096",), 0.90),
    Target(
        *("embedding gradient into a buffer", ("embedding main_grad",), ("bwd",)),
        *(("16384 of 128256 x 4096",), 0.85),
    ),
]

EPILOGUES = (("gemm bias", "fwd"), ("gemm gelu", "fwd"), ("gemm gelu_grad", "dgrad"))
BOTH = ("both",)
PROMISES = ("promised", "recomputed")


def products():
    yield Target("gemm", ("gemm",), ("fwd", "dgrad", "wgrad"), PRODUCTS, 1.0, "eager")
    for name, direction in EPILOGUES:
        yield Target(f"{name}, in the epilogue", (name,), (direction,), PRODUCTS, 0.98, "products")
    row = ("weight gradient into main_grad", ("gemm main_grad",), ("wgrad",), PRODUCTS)
    yield Target(*row, 0.97, "products")


def fused():
    row = ("LayerNormLinear", ("norm_linear",), BOTH, LINEARS)
    yield Target(*row, 0.99)
    yield Target(*row, 1.0, "te")
    yield Target(*row, 0.6, "kept", most=True)
    row = ("LayerNormMLP, SwiGLU", ("norm_mlp swiglu",), BOTH, MLP)
    yield Target(*row, 0.98)
    for rival in ("te", "compile", "eager"):
        yield Target(*row, 1.0, rival)
    yield Target(*row, 0.55, "kept", most=True)
    name = "fused_linear_cross_entropy"
    yield Target(name, (name,), PROMISES, HEAD, 0.90, "products")
    yield Target(name, (name,), PROMISES, HEAD, 1000, "peak", most=True)


def blocks():
    row = ("Llama-3-8B block, B4 S4096", ("block",), BOTH, BLOCK)
    yield Target(*row, 0.95)
    for rival, least in (("te", 1.02), ("compile", 1.08), ("eager_cudnn", 1.13)):
        yield Target(*row, least, rival)
    yield Target(*row, 1600, "kept MB", most=True)
    row = ("the same block at B1 S512, graphed", ("block graphed",), BOTH)
    for rival, least in (("eager", 1.8), ("compile", 1.4)):
        yield Target(*row, ("1 x 512 x 4096, ffn 14336",), least, rival)
    row = ("host, norm + linear", ("norm_linear host",), BOTH, ("16 x 64 to 64",))
    yield Target(*row, round(1 / 1.2, 3))
    for rival, share in (("eager", 0.75), ("te", 0.35)):
        yield Target(*row, round(1 / share, 3), rival)
    yield Target("host, Linear", ("linear host",), BOTH, ("16 x 64 to 64",), 1.0, "eager")
    row = ("host, whole block", ("block host",), BOTH, ("1 x 16 x 256, ffn 512",))
    yield Target(*row, 2.0, "eager")


def cpu_rows():
    """What is timed of the memory-bound ops on a CPU: what, names, directions, shapes, dtypes, and
    the one rival where there is no other: stock's layer norm in bfloat16 is not timed backward, nor
    a compiled embedding."""
    both, f32, bf16, one = ("fwd", "bwd"), ("f32",), ("bf16",), ("4096 x 1024",)
    gates = tuple(f"gated_activation {kind}" for kind in KINDS)
    plain = tuple(f"activation {kind}" for kind in PLAIN_KINDS)
    classes = ("4096 x 8192", "1024 x 32000")
    heads = ("4 x 1024 x 16 (4) x 64", "1 x 1024 x 8 (8) x 128")
    scores = ("4 x 8 x 512 x 512", "1 x 4 x 1024 x 4096")
    norms, rms, layer = (*NORMS, *RESIDUAL), (NORMS[0], RESIDUAL[0]), (NORMS[1], RESIDUAL[1])
    yield "norms", norms, both, (*one, "2048 x 4096", "4096 x 4096"), f32
    yield "norms", norms, ("fwd",), one, bf16
    yield "norms", rms, ("bwd",), one, bf16
    yield "norms", layer, ("bwd",), one, bf16, "compile"
    yield "gated_activation", (*GATES, *BIASED_GATES), both, one, f32
    yield "gated_activation", gates, both, ("4096 x 2048",), f32
    yield "gated_activation", gates, both, one, bf16
    yield "activation", (*plain, *BIASED), both, one, f32
    yield "activation", plain, both, ("4096 x 4096",), f32
    yield "activation", plain, both, one, bf16
    for name in ("cross_entropy", "cross_entropy promised"):
        yield name, (name,), ("fwd+bwd",), classes, f32
        yield name, (name,), ("fwd+bwd",), classes[:1], bf16
    yield "softmax", SOFTMAX, both, scores, f32
    yield "bias_dropout_add", ("dropout_add", "bias_dropout_add"), both, one, f32
    yield "rotary", ROTARY, both, heads, f32
    yield "rotary", ROTARY[:1], both, ("4 x 4096 x 16 (4) x 64",), f32
    yield "rotary", ROTARY[:1], both, heads[:1], bf16
    table = ("4096 of 8192 x 1024",)
    yield "embedding", ("embedding",), ("fwd",), table, f32, "eager"
    yield "embedding", ("embedding main_grad",), ("bwd",), table, f32, "eager"
    yield "adamw_step", ("adamw_step",), ("step",), ("16 x 512 x 1024",), ("f32", "bf16 master")
    yield "clip_grad_norm", ("clip_grad_norm",), ("coeff",), ("16 x 512 x 1024",), ("f32", "bf16")


def cpu():
    for what, names, directions, shapes, dtypes, *only in cpu_rows():
        for rival, least in (("eager", 1.5), ("compile", 1.0)):
            if rival in (only or [rival]):
                yield Target(what, names, directions, shapes, least, rival, dtypes=dtypes)


BESIDE = {
    "Products": " The CPU's GPT, its tokens a second and its memory, is in `make dyno`'s report."
}
MOST_NOISE = 0.05  # a wider spread excuses no more
WORDS = ("short", "within the spread", "not measured")
TABLES = {"Memory-bound parts": MEMORY, "Products": [*products(), *fused(), *blocks()]}
CPU_TABLES = {"Memory-bound parts on a CPU": [*cpu()]}


def tables_of(result):
    """A CPU has no driver."""
    return TABLES if result["driver"] else CPU_TABLES


@dataclass(frozen=True)
class Verdict:
    """`word`: met, short, "within the spread" (short by less than it) or "not measured"."""

    target: Target
    cell: tuple[str, str, str, str]  # name, direction, shape, dtype
    value: float | None
    word: str

    def row(self):
        return dict(zip(("name", "direction", "shape", "dtype"), self.cell, strict=True))

    def shown(self):
        if self.value is None:
            return "–"
        return f"{self.value:,.0f}" if self.target.limit >= 100 else f"{self.value:.3f}"


def value_of(target, row, result):
    """What a row says of a measure, or None."""
    kept, times = row.get("kept_bytes", {}), row["rivals"]
    if target.measure == "redline":
        return row["of_redline"]
    if target.measure == "kept":
        return kept["redline"] / kept["eager"] if {"redline", "eager"} <= {*kept} else None
    if target.measure == "kept MB":
        return kept["redline"] / 1e6 if "redline" in kept else None
    if target.measure == "peak":
        peak = row.get("peak_bytes", {})
        return peak["redline"] / 1e6 if "redline" in peak else None
    if target.measure == "empty":
        bytes_us = row["gb_s"] * row["time_us"] / result["copy_gb_s"]
        return row["time_us"] / (times["empty"] + bytes_us) if "empty" in times else None
    return times[target.measure] / row["time_us"] if target.measure in times else None


def judged(target, cell, rows, result):
    row = rows.get(cell)
    value = value_of(target, row, result) if row else None
    if value is None:
        return Verdict(target, cell, None, "not measured")
    value = round(value, 3)  # as it is printed
    short_by = (value / target.limit - 1) * (1 if target.most else -1)
    if short_by <= 0:
        return Verdict(target, cell, value, "met")
    timed = target.measure not in ("kept", "kept MB", "peak")
    within = timed and short_by <= min(row["spread"], MOST_NOISE)
    return Verdict(target, cell, value, "within the spread" if within else "short")


def verdicts(result):
    """Of each table each target's, in order."""
    rows = {tuple(r[k] for k in ("name", "direction", "shape", "dtype")): r for r in result["rows"]}
    return {
        table: [judged(target, cell, rows, result) for target in targets for cell in target.cells()]
        for table, targets in tables_of(result).items()
    }


def counted(found):
    """How many are met, of how many, and the rest by word."""
    words = [verdict.word for verdict in found]
    rest = [f"{words.count(word)} {word}" for word in WORDS if word in words]
    return ", ".join([f"{words.count('met')} of {len(words)} met", *rest])


def listing(result):
    """A line per cell, as a terminal shows it."""
    for table, found in verdicts(result).items():
        yield f"{table}: {counted(found)}"
        for verdict in found:
            name, direction, shape, dtype = verdict.cell
            line = f"{verdict.word:<18}{verdict.shown():>8}  {verdict.target.wanted():<30}"
            line += f"  {name} {direction} {shape} {dtype}"
            if verdict.word == "short":
                line += f": {reasons.find(result['gpu'], verdict.row(), 'target').plain()}"
            yield line


def named(names):
    """`op` and its variants, the op written once."""
    for op, group in itertools.groupby(names, key=lambda name: name.split(" ")[0]):
        first, *others = (name.removeprefix(op) for name in group)
        yield ",".join([f"`{op}`{first}", *others])


def summary(found):
    """A line per target: the rows that it is about, and how many of them."""
    lines = ["| what | rows | target | cells |", "|---|---|---|---|"]
    for target, group in itertools.groupby(found, key=lambda verdict: verdict.target):
        rows = f"{'; '.join(named(target.names))}: {', '.join(target.directions)}"
        lines.append(f"| {target.what} | {rows} | {target.wanted()} | {counted([*group])} |")
    return lines


def listed(found, why):
    """A line per reason, in it the rows by name, direction and target, with what they reached."""
    reasoned = {}
    for verdict in found:
        name, direction, shape, dtype = verdict.cell
        row = f"`{name}` {direction}, {verdict.target.wanted()}"
        dtype = "" if len(verdict.target.dtypes) == 1 else f" {dtype}"
        reached = "" if verdict.value is None else f" {verdict.shown()}"
        rows = reasoned.setdefault(why(verdict) or row, {})
        rows.setdefault(row, []).append(f"{shape}{dtype}{reached}")
    for reason, rows in reasoned.items():
        several = {
            row: cells if found[0].value is not None or len(cells) < 4 else [f"{len(cells)} cells"]
            for row, cells in rows.items()
        }
        line = "; ".join(f"{row}: {', '.join(cells)}" for row, cells in several.items())
        yield f"* {line}" + ("" if reason in rows else f". Why: {reason}")


def markdown(result):
    """The section of a table of results; none where no cell was measured."""
    tables = verdicts(result)
    every = [verdict for found in tables.values() for verdict in found]
    if all(verdict.value is None for verdict in every):
        return []
    lines = [f"## Targets: {counted(every)}", ""]
    for table, found in tables.items():
        lines += [f"{table}: {counted(found)}.{BESIDE.get(table, '')}", "", *summary(found), ""]

    def why(verdict):
        library = verdict.word == "not measured" and verdict.target.measure in rivals.LIBRARIES
        if not library and verdict.word != "short":
            return None
        against = verdict.target.measure if library else "target"
        return reasons.find(result["gpu"], verdict.row(), against).link()

    for word in WORDS:
        chosen = [verdict for verdict in every if verdict.word == word]
        if chosen:
            title = {"short": "Short:"}.get(word, word.capitalize() + ":")
            lines += [title, "", *listed(chosen, why), ""]
    return lines
