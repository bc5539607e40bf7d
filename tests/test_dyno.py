"""The side-by-side job: its text, its measuring, its report, and what it says when it stops."""

import itertools
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from redline.dyno import (
    Options,
    addresses,
    block,
    job,
    lap,
    measure,
    parts,
    plots,
    quiet,
    report,
    run,
    stock,
    text,
)
from redline.dyno.machine import Ceilings
from redline.dyno.measure import DynoError
from redline.dyno.part import Setting

SHAPE = stock.Shape(
    vocabulary=320, hidden=32, ffn=48, layers=1, heads=4, kv_heads=2, sequence=16, batch=2
)
CPU = torch.device("cpu")


class StockTwice(lap.Trainer):
    """Stock parts on both sides: what is tested is the lap, not the library."""

    def __init__(self, variant, setup):
        super().__init__("stock", setup)
        self.variant = variant


def make_setup(steps=4):
    return lap.Setup(SHAPE, CPU, torch.float32, steps)


@pytest.fixture(scope="module")
def corpus():
    return text.learn("a test", ["the quick brown fox jumps over the lazy dog. " * 60], 320)


@pytest.fixture(scope="module")
def finished(corpus):
    batches = text.Batches(corpus, SHAPE.batch, SHAPE.sequence, 0)
    return lap.run_lap(make_setup(), batches, lambda step: None, StockTwice)


def make_row(**changes):
    row = parts.Row("rms_norm", "forward+backward", "8 x 8", "float32", floor_bytes=1e6)
    row.times = {"stock": [400.0, 420.0, 410.0], "tuned": [200.0, 210.0, 205.0]}
    row.saved = {"stock": 2000, "tuned": 1000}
    row.errors = {"stock": 1e-7, "tuned": 2e-7}
    row.reasons = {"compiled": "this Python has no Python.h"}
    for name, value in changes.items():
        setattr(row, name, value)
    row.hold_against(Ceilings(1e10, 1e11, "float32"))
    return row


def make_block():
    spans = [block.Span("aten::mm", 0.0, 30.0), block.Span("aten::mul", 40.0, 20.0)]
    sides = {
        "stock": block.Timeline([*spans, block.Span("aten::mm", 60.0, 40.0)], 2, 3000),
        "tuned": block.Timeline(spans, 1, 1000),
    }
    return block.Block("1 x 8 x 16, ffn 44", "cpu", sides)


@pytest.fixture
def result(finished, corpus):
    return report.Result(
        machine={"device": "cpu", "allocator": "a test's"},
        versions={"redline": "0", "commit": None, "command": "redline dyno <x>"},
        ceilings=Ceilings(1e10, 1e11, "float32"),
        rows=[make_row()],
        lap=finished,
        block=make_block(),
        corpus=corpus,
        addresses=addresses.Addresses("DeprecationWarning: moved", True),
    )


# The text.


def test_default_text_is_the_standard_library():
    name, documents = text.read_text(None)
    assert "standard library" in name and sum(map(len, documents)) > 1 << 20


def test_folder_skips_what_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    assert text.read_text(tmp_path)[1] == ["words"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b" \n", "is empty"), (b"a\0b", "not text")],
)
def test_bad_text_is_one_line(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DynoError, match=message) as raised:
        text.read_text(path)
    assert "\n" not in str(raised.value)


def test_short_text_is_refused(corpus):
    with pytest.raises(DynoError, match="one sequence needs"):
        text.Batches(corpus, 1, len(corpus.tokens), 0)


def test_batches_depend_on_the_step_alone(corpus):
    first, second = (text.Batches(corpus, 2, 8, 0) for _ in range(2))
    assert torch.equal(first[3][0], second[3][0]) and not torch.equal(first[3][0], first[4][0])
    tokens, targets = first[0]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


# Measuring.


def test_saved_bytes_count_each_storage_once_and_no_weight():
    x, w = torch.randn(64, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    assert measure.saved_bytes(lambda: (x * w) * x.exp(), [w]) == 3 * x.nbytes


def test_peak_is_the_allocators():
    def run_once():
        big = torch.empty(1 << 20)
        del big
        return torch.empty(1 << 18)

    with measure.quiet_profiler():
        peak = measure.profiled(run_once, CPU).peak_bytes
    assert 4 << 20 <= peak < 5 << 20


def test_disturbed_rounds_are_dropped(monkeypatch):
    verdicts = itertools.chain([False] * 3, itertools.repeat(True))
    monkeypatch.setattr(quiet.Watch, "ripe", property(lambda self: True))
    monkeypatch.setattr(quiet.Watch, "was_quiet", lambda self: next(verdicts))
    times = itertools.count()
    monkeypatch.setattr(measure, "_cpu_us", lambda call: next(times))
    timing = measure.interleave({"only": lambda: None}, CPU, 0.01)
    assert timing.times["only"][:5] == [3, 4, 5, 6, 7] and not timing.disturbed


def test_never_quiet_is_said(monkeypatch):
    monkeypatch.setattr(quiet.Watch, "was_quiet", lambda self: False)
    assert measure.interleave({"only": lambda: None}, CPU, 0.01).disturbed


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_watch_sees_another_program(monkeypatch):
    watch = quiet.Watch()
    watch.free = 0  # as on a machine whose cores are all taken
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        watch.restart()
        time.sleep(0.5)
        assert not watch.was_quiet() and watch.others > quiet.ALLOWED_CORES
    finally:
        other.kill()
        other.wait()


def test_compiler_missing_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(parts.sysconfig, "get_path", lambda name: str(tmp_path))
    assert parts.why_no_compiler(CPU) == "this Python has no Python.h"


# The lap.


def test_a_long_lap_is_calm():
    rates = [job.shape_for(CPU, steps).learning_rate for steps in (40, 500)]
    assert rates == [1e-3, 3e-4] == [1e-3, job.shape_for(torch.device("cuda"), 40).learning_rate]


def test_same_parts_give_the_same_losses(finished):
    assert finished.max_loss_difference == 0.0 and finished.right
    assert finished.sides["stock"].losses[0] == pytest.approx(5.77, abs=0.3)


def test_a_difference_beyond_the_bound_is_wrong(finished):
    sides = {v: lap.Side(list(finished.sides[v].losses)) for v in lap.VARIANTS}
    sides["tuned"].losses[-1] += 2 * finished.bound
    assert not lap.Lap(finished.setup, sides, finished.quiet, finished.bound).right


def test_a_long_lap_compares_means(finished):
    """Rounding moves a loss up and down; a drift stays."""
    setup = replace(finished.setup, steps=200)
    stock = [1.0] * 200

    def of(tuned):
        sides = {"stock": lap.Side(stock), "tuned": lap.Side(tuned)}
        return lap.Lap(setup, sides, [True] * 200, finished.bound)

    beyond = 4 * finished.bound
    noisy = of([1.0 + beyond * (-1) ** step for step in range(200)])
    assert len(noisy.loss_differences) == 176 and noisy.max_loss_difference < beyond / 20
    assert noisy.right and "means of 25 steps" in report._right(noisy).detail
    drifting = of([1.0] * 175 + [1.0 + 1.1 * finished.bound] * 25)
    assert drifting.max_loss_difference == pytest.approx(1.1 * finished.bound)
    assert not drifting.right


def test_disturbed_lap_makes_no_claim(finished):
    busy = lap.Lap(finished.setup, finished.sides, [False] * 4, finished.bound)
    assert busy.disturbed and report.headlines(busy)[1].answer == "No claim"


def test_tuned_state_groups_the_rows_of_qkv():
    weight = torch.arange((4 + 2 + 2) * SHAPE.head_dim).float()[:, None]
    q, k, v = weight.split([32, 16, 16])
    expected = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    assert torch.equal(stock.grouped_qkv(weight, SHAPE), expected)


def test_nan_names_the_first_part(corpus):
    class Poisoned(StockTwice):
        def step(self, tokens, targets):
            norm = self.model.layers[0].mlp.norm
            norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            return super().step(tokens, targets)

    batches = text.Batches(corpus, SHAPE.batch, SHAPE.sequence, 0)
    with pytest.raises(DynoError, match=r"loss became nan at step 1: .*layers\.0\.mlp\.norm"):
        lap.run_lap(make_setup(), batches, lambda step: None, Poisoned)


def test_nan_born_in_backward_names_the_part(corpus):
    class Poisoned(StockTwice):
        def step(self, tokens, targets):
            def poison(module, inputs, output):
                if output.requires_grad:
                    output.register_hook(lambda gradient: gradient * float("nan"))

            self.model.layers[0].mlp.norm.register_forward_hook(poison)
            return super().step(tokens, targets)

    batches = text.Batches(corpus, SHAPE.batch, SHAPE.sequence, 0)
    expected = r"gradients' norm became nan at step 1: .*in backward is layers\.0\.mlp\.norm$"
    with pytest.raises(DynoError, match=expected):
        lap.run_lap(make_setup(), batches, lambda step: None, Poisoned)


def test_model_flops_are_those_of_its_products(finished):
    model, tokens = stock.GPT(SHAPE), torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:  # torch's, which leaves out CPU attention
        model(tokens, tokens).backward()
    seen = SHAPE.sequence / 2  # keys by a query, in the mean
    attention = 2 * 2 * 3 * SHAPE.layers * SHAPE.hidden * seen  # two products, thrice
    flops = counter.get_total_flops() + SHAPE.tokens * attention
    assert SHAPE.model_flops == flops
    rate = finished.tokens_per_second("tuned") / SHAPE.tokens
    expected = flops * rate / 1e11
    assert finished.flop_utilisation("tuned", Ceilings(1e10, 1e11, "")) == pytest.approx(expected)


# The report.


def test_json_has_exactly_the_keys(result):
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert set(found) == {"machine", "versions", "ceilings", "parts", "lap", "block"}
    assert set(found["parts"][0]) == {
        "name", "direction", "shape", "dtype", "stock_us", "compiled_us", "tuned_us", "spread",
        "stock_saved_bytes", "compiled_saved_bytes", "tuned_saved_bytes", "stock_error",
        "compiled_error", "tuned_error", "of_redline",
    }  # fmt: skip
    assert found["parts"][0]["compiled_us"] is None
    assert found["parts"][0]["of_redline"] == pytest.approx(100 / 205)
    assert set(found["lap"]) == {"stock", "tuned", "max_loss_difference", "bound"}
    assert set(found["lap"]["tuned"]) == {
        "losses", "tokens_per_second", "peak_bytes", "flop_utilisation",
    }  # fmt: skip
    assert found["block"] == {
        "stock": {"time_us": 100.0, "kernels": 3, "saved_bytes": 3000},
        "tuned": {"time_us": 60.0, "kernels": 2, "saved_bytes": 1000},
    }


def test_json_passes_its_checker(result, tmp_path):
    (tmp_path / "dyno.json").write_text(json.dumps(result.as_dict()))
    checker = Path(__file__).parents[1] / "tools" / "check_dyno.py"
    command = [sys.executable, checker, tmp_path / "dyno.json", "--steps", "4"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_page_is_self_contained_and_themed(result):
    page = report.render(result)
    assert "prefers-color-scheme: dark" in page and "redline dyno &lt;x&gt;" in page
    assert "no Python.h" in page and "DeprecationWarning: moved" in page
    assert "src=" not in page and "@import" not in page and "<link" not in page
    assert plots.LIGHT["tuned"] not in page[page.index("<body>") :]


def test_disturbed_part_has_no_ratio(result):
    result.rows = [make_row(disturbed=True)]
    page = report.render(result)
    assert "are no claim: rms_norm" in page and "2.00×" not in page


def test_files_appear_together_or_not_at_all(result, tmp_path):
    out = tmp_path / "out"
    with report.aside(out) as folder:
        report.write(result, folder)
        assert [p.name for p in out.iterdir()] == [folder.name]
    names = {p.name for p in out.iterdir()}
    assert {"report.html", "dyno.json", "losses.png", "parts-dark.png", "block.png"} <= names
    assert not any(name.startswith(".") for name in names)


def full_disk(result, folder):
    (folder / "losses.png").mkdir()  # what cannot be written over fails like a full disk
    report.write(result, folder)


def broken_sensor(result, folder):
    raise OSError(5, "Input/output error")


def interrupted(result, folder):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("write", "raised", "message"),
    [
        (full_disk, DynoError, "^--out: .*Is a directory; nothing was written$"),
        (broken_sensor, OSError, "Input/output error$"),
        (interrupted, KeyboardInterrupt, "^$"),
    ],
)
def test_fault_leaves_the_old_report(result, tmp_path, write, raised, message):
    (tmp_path / "dyno.json").write_text("old")
    with pytest.raises(raised, match=message) as error, report.aside(tmp_path) as folder:
        write(result, folder)
    assert error.type is raised
    assert [p.name for p in tmp_path.iterdir()] == ["dyno.json"]
    assert (tmp_path / "dyno.json").read_text() == "old"


# The command.


def test_warning_of_the_old_address_is_as_printed():
    found = addresses.compare(CPU, torch.float32)
    assert found.same_bits and found.reason is None
    assert re.match(r".*/addresses\.py:\d+: DeprecationWarning: .* moved", found.warning)


def test_curves_apart_exit_non_zero(monkeypatch, result, tmp_path):
    result.lap.sides["tuned"].losses[-1] += 1.0
    try:
        monkeypatch.setattr(job, "_measure", lambda *_: result)
        assert run(Options(out=tmp_path)) == 1
        assert (tmp_path / "report.html").exists()
    finally:
        result.lap.sides["tuned"].losses[-1] -= 1.0


def test_bounds_are_those_of_the_document():
    document = Path(__file__).parents[1] / "docs" / "numerics.md"
    if not document.exists():
        pytest.skip("docs/numerics.md is not written yet")
    for dtype, bound in lap.BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        row = re.search(rf"^\| {name} \| ([\d.e-]+) \|$", document.read_text(), re.MULTILINE)
        assert row and float(row[1]) == bound


def test_setting_has_whole_heads():
    batch, sequence, heads, dim = Setting.for_device(CPU, torch.float32).heads_shape
    assert batch * sequence == 4096 and heads * dim == 1024
