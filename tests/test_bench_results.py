"""The published results: what they are held to, and the reasons where they fall short."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "bench"))

import reasons  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402
import targets  # noqa: E402
import test_bench  # noqa: E402

FILES = sorted((root / "bench" / "results").glob("*.json"))
PUBLISHED = [path for path in FILES if not path.stem.endswith("_bytes")]
published = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)


def row_of(name, shape, direction="fwd", **fields):
    return test_bench.row_of(name=name, shape=shape, direction=direction, **fields)


def result_of(*rows):
    return test_bench.result_of(*rows) | {"copy_gb_s": 3000.0, "driver": "580"}


# --- targets --------------------------------------------------------------------------------------


def verdict_of(row, measure):
    tables = targets.verdicts(result_of(row))
    key = tuple(row[k] for k in ("name", "direction", "shape", "dtype"))
    (found,) = (
        v for t in tables.values() for v in t if v.cell == key and v.target.measure == measure
    )
    return found


@pytest.mark.parametrize(
    ("fields", "measure", "value", "word"),
    [
        ({"of_redline": 0.9901}, "redline", 0.99, "met"),
        ({"of_redline": 0.9894}, "redline", 0.989, "within the spread"),
        ({"of_redline": 0.9894, "spread": 0.0001}, "redline", 0.989, "short"),
        ({"of_redline": 0.9, "spread": 0.5}, "redline", 0.9, "short"),
        ({}, "te", None, "not measured"),
        ({"rivals": {"te": 10.0}}, "te", 1.0, "met"),
        ({"kept_bytes": {"redline": 6, "eager": 10}}, "kept", 0.6, "met"),
        ({"kept_bytes": {"redline": 7, "eager": 10}}, "kept", 0.7, "short"),
        ({"kept_bytes": {"redline": 7}}, "kept", None, "not measured"),
    ],
)
def test_a_cell_is_met_short_or_neither(fields, measure, value, word):
    row = row_of("norm_linear", "16384 x 4096 to 6144", "both", **({"spread": 0.01} | fields))
    found = verdict_of(row, measure)
    assert (found.value, found.word) == (value, word)


def test_small_work_is_held_to_empty_kernels_and_its_bytes():
    """6 us of empty kernels, and 3e6 bytes at 3000 GB/s."""
    row = row_of("rms_norm", "64 x 4096", time_us=10.0, gb_s=300.0, rivals={"empty": 6.0})
    assert verdict_of(row, "empty").value == pytest.approx(10 / 7, abs=1e-3)
    assert verdict_of(row, "empty").word == "short"


def test_memory_is_judged_in_bytes():
    shape, peak = "8192 x 4096 x 128256", {"redline": 722_000_000, "eager": 14_300_000_000}
    row = row_of("fused_linear_cross_entropy", shape, "promised", peak_bytes=peak)
    assert (verdict_of(row, "peak").shown(), verdict_of(row, "peak").word) == ("722", "met")
    row = row_of("block", targets.BLOCK[0], "both", kept_bytes={"redline": 1_700_000_000})
    assert verdict_of(row, "kept MB").word == "short"


def test_every_target_names_rows_that_are_timed(monkeypatch):
    """A GPU's names and directions, by the cases of a CPU; its sizes its results have. A CPU's
    rows as they are."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    timed = set()
    for path in (root / "bench").glob("bench_*.py"):
        module = importlib.import_module(path.stem)
        cases = module.cases("cpu")
        timed |= {(case.name, case.direction, case.shape, case.dtype) for case in cases}
    named = {row[:2] for row in timed} | {("block graphed", "both")}
    for target in every_target(targets.TABLES):
        assert {cell[:2] for cell in target.cells()} <= named, target.what
        assert target.measure in (
            *("redline", "kept", "kept MB", "peak", "empty"),
            *(*rivals.NAMES, *rivals.PARTS),
        )
    for target in every_target(targets.CPU_TABLES):
        assert {*target.cells()} <= timed, target.what


def every_target(tables):
    return [target for table in tables.values() for target in table]


def test_the_tables_of_targets_have_their_sizes():
    h100 = json.loads((root / "bench/results/nvidia_h100.json").read_text())
    rows = {tuple(r[k] for k in ("name", "direction", "shape", "dtype")) for r in h100["rows"]}
    assert {cell for target in every_target(targets.TABLES) for cell in target.cells()} <= rows
    for tables in (targets.TABLES, targets.CPU_TABLES):
        cells = [(t, cell) for t in every_target(tables) for cell in t.cells()]
        assert len({*cells}) == len(cells)


def test_a_cpu_has_targets_of_its_own():
    row = row_of("rms_norm", "4096 x 1024", dtype="f32", rivals={"eager": 14.0, "compile": 10.0})
    (table,) = targets.verdicts(result_of(row) | {"driver": ""}).values()
    found = {v.target.measure: v.word for v in table if v.value is not None}
    assert found == {"eager": "short", "compile": "met"}


# --- reasons --------------------------------------------------------------------------------------


def test_the_first_reason_that_fits_is_said(monkeypatch):
    entries = [
        {"op": "norm", "shape": "1 x *", "against": ["target", "te"], "why": "one row"},
        {
            "gpu": "*H100*",
            "op": ["norm", "rope"],
            "against": "target",
            "why": "waits",
            "doc": "a#b",
        },
    ]
    monkeypatch.setattr(reasons, "entries", lambda: entries)
    assert reasons.find("any", row_of("norm", "1 x 8"), "te").plain() == "one row"
    assert reasons.find("an H100", row_of("rope", "2 x 8"), "target").plain() == "waits (docs/a#b)"
    assert "[a](../../docs/a#b)" in reasons.find("an H100", row_of("rope", ""), "target").link()
    assert reasons.find("an H200", row_of("rope", "2 x 8"), "target") == reasons.NONE
    assert reasons.find("an H100", row_of("norm", "2 x 8"), "te") == reasons.NONE


def test_a_table_says_what_is_short_who_is_ahead_and_why(monkeypatch):
    entries = [{"op": "rms_norm", "against": ["target", "liger"], "why": "waits"}]
    monkeypatch.setattr(reasons, "entries", lambda: entries)
    short = row_of("rms_norm", "16384 x 4096", rivals={"liger": 9.0, "eager": 9.0})
    text = report.markdown(result_of(short, row_of("softmax", "2 x 32 x 2048 x 2048")))
    assert "## Targets: 0 of" in text
    assert "* `rms_norm` fwd, ≥ 0.97 of redline: 16384 x 4096 0.900. Why: waits\n" in text
    assert "0.900. Why: no reason given\n" in text
    assert "* `rms_norm` fwd, liger: 16384 x 4096 0.90. Why: waits\n" in text
    assert "* `rms_norm` fwd, eager: 16384 x 4096 0.90. Why: no reason given\n" in text
    assert "rms_norm fwd 16384 x 4096 bf16: waits" in "\n".join(targets.listing(result_of(short)))
    assert "## Targets" not in report.markdown(result_of(row_of("nothing", "1")))


@published
def test_every_published_shortfall_has_a_reason(path):
    text = report.markdown(json.loads(path.read_text()))
    assert reasons.NONE.why not in text, [line for line in text.splitlines() if "no reason" in line]


@published
def test_the_published_table_is_its_jsons(path):
    assert path.with_suffix(".md").read_text() == report.markdown(json.loads(path.read_text()))


def test_every_reason_stands_in_a_section_that_is_there():
    for entry in reasons.entries():
        if "doc" not in entry:
            continue
        name, section = entry["doc"].split("#")
        titles = re.findall(r"^#+ (.*)$", (root / "docs" / name).read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert section in slugs, entry["doc"]


def test_an_entry_of_an_unknown_field_is_refused(tmp_path, monkeypatch):
    (tmp_path / "reasons.toml").write_text('[[reason]]\nagainst = "te"\nwhy = "x"\nshap = "1"\n')
    monkeypatch.setattr(reasons, "FILE", tmp_path / "reasons.toml")
    with pytest.raises(ValueError, match="'shap'"):
        reasons.entries.__wrapped__()
