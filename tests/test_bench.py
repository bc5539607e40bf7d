"""The bench: what it times, what it refuses to time, and what it says of two files."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import redline

bench_folder = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(bench_folder))

import bench  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402

OPS = sorted(path.stem for path in bench_folder.glob("bench_*.py"))
SMALL = {  # in place of an op's sizes for CPUs, which are for timing
    "bench_activation": (32, 64),
    "bench_adamw": (3, (16, 32)),
    "bench_attention": (2, 64, 4, 2, 64),
    "bench_block": (2, 16, {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2}, "graph"),
    "bench_cross_entropy": (16, 100),
    "bench_embedding": (32, 50, 16),
    "bench_gated_activation": (32, 64),
    "bench_linear": (32, 16, 24),
    "bench_norm": (32, 64),
    "bench_rotary": (2, 16, 4, 2, 64),
    "bench_softmax": (2, 3, 16, 16),
}


def case_of(**calls):
    made = torch.arange(12.0).reshape(3, 4)
    return bench.Case("double", "fwd", "3 x 4", "f32", 96, lambda: (made.clone(),), calls)


def row_of(**fields):
    row = {"name": "norm", "direction": "fwd", "shape": "8 x 8", "dtype": "bf16", "time_us": 10.0}
    row |= {"spread": 0.001, "floor_us": 9.0, "of_redline": 0.9, "gb_s": 1.0, "tflop_s": 0.0}
    return row | {"rivals": {}, "not_timed": {}} | fields


def result_of(*rows):
    machine = {"gpu": "GPU", "torch": "2.11", "driver": "", "commit": "abc", "command": "bench"}
    ceilings = {"copy_gb_s": 1.0, "gemm_tflop_s": 1.0, "date": "2026-01-01"}
    return {**machine, **ceilings, "rows": list(rows)}


# --- every row's stock composition is the op ------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_stock_gives_what_redline_gives(op, monkeypatch):
    """Compiled forms are stock's by torch.compile, and are left out for their time."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    module = importlib.import_module(op)
    if op in SMALL:
        for sizes in {"SIZES_CPU", "SIZES_CPU_LARGE", "SIZES_CPU_BF16"} & set(vars(module)):
            monkeypatch.setattr(module, sizes, [SMALL[op]])
    for case in module.cases("cpu"):
        if not case.random:
            bench.check(case, case.make(), "cpu")
            assert not case.not_timed, case.name
        assert {"redline", "eager"} <= {*case.calls} <= {"redline", *rivals.NAMES, *rivals.PARTS}
        assert case.bytes > 0


# --- what is not timed ----------------------------------------------------------------------------


def no_kernel(x):
    raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (lambda x: x * 2.001, "of ours apart, more than 1e-04"),
        (lambda x: (x * 2).masked_fill(x == 5, float("nan")), "result 0 is not finite"),
        (lambda x: (x * 2)[:2], "gives [(2, 4)], not [(3, 4)]"),
        (lambda x: (x * 2, x), "gives [(3, 4), (3, 4)], not [(3, 4)]"),
        (no_kernel, "RuntimeError: no kernel"),
    ],
)
def test_a_rival_of_another_result_is_named_and_not_timed(rival, reason):
    case = case_of(redline=lambda x: x * 2, rival=rival, other=lambda x: x + x)
    bench.check(case, case.make(), "cpu")
    assert list(case.calls) == ["redline", "other"]
    assert reason in case.not_timed["rival"]


def test_a_call_that_writes_over_its_input_does_not_spoil_the_next():
    case = case_of(redline=lambda x: x.mul_(2), first=lambda x: x.mul_(2), second=lambda x: x * 2)
    (inputs,) = case.make()
    bench.check(case, (inputs,), "cpu")
    assert case.not_timed == {}
    assert torch.equal(inputs, case.make()[0])


def test_a_rival_that_is_not_installed_is_said_and_not_needed(monkeypatch, capsys):
    monkeypatch.setattr(rivals, "LIBRARIES", {"liger": ("no_such_library", "no-such")})
    monkeypatch.setattr(rivals, "_loaded", {})
    assert rivals.load() == {}
    assert "rivals: none; absent: liger (ModuleNotFoundError" in capsys.readouterr().out
    assert rivals.calls("rms_norm", None) == {}


def test_a_rival_whose_names_have_moved_is_a_reason_and_not_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    monkeypatch.setattr(rivals, "LIBRARIES", {"liger": rivals.LIBRARIES["liger"]})
    monkeypatch.setattr(rivals, "_loaded", {})
    assert list(rivals.load()) == ["liger"]
    calls = rivals.calls("activation squared_relu")
    case = case_of(redline=lambda x: x.relu().square(), **calls)
    bench.check(case, case.make(), "cpu")
    assert case.not_timed["liger"].startswith("AttributeError")


def test_a_pair_of_kernels_is_differentiable_and_may_be_walked_twice():
    call = rivals.pair(
        lambda x, w: (x * w, (x, w)),
        lambda g, x, w: (g * w, (g * x).sum(0)),
        w := (torch.tensor([2.0, 3.0], requires_grad=True)),
    )
    x = torch.tensor([[1.0, 4.0], [5.0, 6.0]], requires_grad=True)
    y = call(x)
    for _ in range(2):
        x_grad, w_grad = torch.autograd.grad(y, (x, w), torch.ones(2, 2), retain_graph=True)
        assert x_grad.tolist() == [[2, 3], [2, 3]]
        assert w_grad.tolist() == [6, 10]


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "spread", "word"),
    [
        (0.905, 0.001, "same"),
        (0.95, 0.001, "faster"),
        (0.85, 0.001, "slower"),
        (0.95, 0.10, "unclear"),
        (0.90, 0.10, "unclear"),  # no change seen, and one of 2 % could not be
        (0.99, 0.08, "faster"),
    ],
)
def test_two_rows_compare_by_their_spreads(share, spread, word):
    found, ratio = report.verdict(row_of(), row_of(of_redline=share, spread=spread))
    assert found == word
    assert ratio == pytest.approx(share / 0.9)


def test_two_results_compare_row_by_row():
    old = result_of(row_of(), row_of(name="gone op"))
    lines = report.compare(old, result_of(row_of(of_redline=0.5), row_of(name="new op")))
    assert [line.split()[0] for line in lines[:3]] == ["slower", "gone", "new"]
    assert lines[3] == "1 slower, 1 gone, 1 new"


def test_the_table_says_where_a_rival_is_ahead_and_which_was_not_timed():
    ahead = row_of(rivals={"eager": 20.0, "te": 9.0}, not_timed={"quack": "result 0 is not finite"})
    table = report.markdown(result_of(ahead, row_of(rivals={"te": 9.9})))
    assert "| 2.00 | * | **0.90** |" in table
    assert "| – | – | 0.99 |" in table
    assert "* quack, norm fwd: result 0 is not finite (8 x 8)" in table
    steps = row_of(rivals={"products": 1.0, "ungraphed": 9.0}, gb_s=0.2, tflop_s=700.0)
    assert "| 9.0 | 0.90 | – | 700 | 0.10 | 0.90 |" in report.markdown(result_of(steps))
    called = result_of(row_of(name="cross_entropy", rivals={"liger": 9.9}))
    assert "liger's cross_entropy waits for" in report.markdown(called | {"driver": "580"})
    assert "waits for" not in table


def test_a_row_says_its_floor_and_what_is_kept():
    case = case_of(redline=lambda x: x, products=lambda x: x)
    case.kept = {"redline": lambda: 5_000_000, "absent": lambda: 7}
    case.times = {"copy": (1.0, 0.0), "products": (2.0, 0.0), "redline": (6.0, 0.0)}
    row = bench.row_of(case, {})
    assert (row["floor_us"], row["of_redline"]) == (3.0, 0.5)
    assert row["kept_bytes"] == {"redline": 5_000_000}
    assert "redline keeps 5.0 MB" in report.line(row)
    assert "* double fwd, 3 x 4: redline 5.0" in report.markdown(result_of(row))
    case.floor = ("products",)
    assert bench.row_of(case, {})["floor_us"] == 2.0


def test_empty_kernels_are_as_many_as_a_call_launches(monkeypatch):
    cycles = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    w = torch.ones(64, requires_grad=True)
    sketch = case_of()
    sketch.bytes = (1, 1)
    forwards = {"redline": lambda x: redline.ops.rms_norm(x, w)}
    forward, backward = bench.both_directions(sketch, forwards, (w,))
    x = torch.randn(4, 64)
    bench.empty_kernels(forward.calls["redline"])(x)
    assert cycles == [0]
    empty = bench.empty_kernels(backward.calls["redline"])
    for _ in range(2):
        empty(x, torch.ones(4, 64))
    found = redline.explain(redline.ops.rms_norm, x.requires_grad_(), w).launches
    count = [launch.direction for launch in found].count("backward")
    assert count > 0
    assert len(cycles) == 1 + 2 * count


def test_a_run_writes_rows_of_the_published_form(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    words = ["bench.py", "embedding", "--device", "cpu", "--quick", "--rivals", "--only", "eager"]
    monkeypatch.setattr(sys, "argv", [*words, "--rows", "embedding fwd", "--json", str(target)])
    monkeypatch.setattr(bench, "ceilings", lambda _: {"copy_gb_s": 1.0, "gemm_tflop_s": 1.0})
    monkeypatch.setattr(bench, "REPEATS", 3)
    monkeypatch.setattr(rivals, "LIBRARIES", {})
    bench.main()
    result = json.loads(target.read_text())
    assert {*result_of()} <= {*result}
    (row,) = result["rows"]
    assert {*row_of()} == {*row}
    assert list(row["rivals"]) == ["eager"]
    assert row["of_redline"] == pytest.approx(row["floor_us"] / row["time_us"])


def test_the_picture_has_every_op_and_the_ceiling(tmp_path):
    pytest.importorskip("matplotlib")
    rows = row_of(rivals={"eager": 20.0}), row_of(name="rope", direction="bwd", floor_us=1.0)
    plot.draw(result_of(*rows), tmp_path / "once.svg")
    picture = (tmp_path / "once.svg").read_text()
    for word in ("norm", "rope", "ceiling", "eager", "Redline", "floor under 10"):
        assert word in picture
    plot.draw(result_of(*rows), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == picture


# --- bytes ----------------------------------------------------------------------------------------


def counts_of(op, field, sizes, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    module = importlib.import_module(f"bench_{op}")
    monkeypatch.setattr(module, "SIZES_CPU", [sizes])
    for case in module.cases("cpu"):
        counts = getattr(case, field)
        yield {name: count() for name, count in counts.items() if name != "compile"}


def test_fused_layers_keep_what_docs_memory_says(monkeypatch):
    rows, cols, ffn = 32, 64, 96
    (kept,) = counts_of("norm_linear", "kept", (rows, cols, 48), monkeypatch)
    assert kept["redline"] == rows * (4 * cols + 4)
    assert kept["kept"] == rows * (2 * 4 * cols + 4)
    assert kept["redline"] <= 0.6 * kept["eager"]
    (kept,) = counts_of("norm_mlp", "kept", (rows, cols, ffn), monkeypatch)
    assert kept["redline"] == rows * (4 * cols + 4 + 2 * 4 * ffn)
    assert kept["redline"] <= 0.55 * kept["eager"]


def test_the_heads_peak_leaves_inputs_and_gradients_out(monkeypatch):
    tokens, hidden, classes = 2048, 16, 8192
    logits = 4 * tokens * classes
    for peak in counts_of(
        "fused_linear_cross_entropy", "peak", (tokens, hidden, classes), monkeypatch
    ):
        assert logits / 8 < peak["redline"] < 0.6 * logits
        assert peak["eager"] > 1.9 * logits
