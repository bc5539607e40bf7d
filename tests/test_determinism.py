"""docs/determinism.md names every op, and tests that exist and run what a row says; and every op a
hundred times, and each of its rows alone."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import contract
from cases import DEVICES, DTYPES
from op_cases import OPS
from redline import ops

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "determinism.md"

devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


# --- every op -------------------------------------------------------------------------------------


def test_every_op_has_a_case():
    named = {name.partition("-")[0] for name in OPS}
    assert named == {*ops.__all__, "gemm", "gemm_gelu", "gemm_into"} - {"WeightGradientQueue"}


@devices
@dtypes
@pytest.mark.parametrize("name", OPS)
def test_a_hundred_runs_have_the_same_bits(name, dtype, device):
    case = OPS[name]
    op = contract.seeded(case.op) if case.random else case.op
    inputs, upstreams, expected = case.inputs(dtype, device), None, None
    for _ in range(100):
        if case.trained:
            outputs, grads, upstreams = contract.gradients(op, inputs, upstreams)
        else:
            outputs, grads = op(*inputs), ()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = expected or [*outputs, *grads]
        contract.equal_bits([*outputs, *grads], expected)


@devices
@dtypes
@pytest.mark.parametrize("name", [name for name, case in OPS.items() if case.per_row])
def test_each_row_alone_has_the_bits_of_the_batch(name, dtype, device):
    case = OPS[name]
    contract.each_row_alone(case.op, case.inputs(dtype, device), case.per_row)


# --- the document ---------------------------------------------------------------------------------


def matrix():
    """(row's label, dtypes, tests as (file, function)); a row that names none has those above."""
    rows, tests = [], []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 5 or not set(cells[2].split()) <= set(DTYPES) or not cells[2]:
            continue
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line) or tests
        rows.append((cells[0] + " " + cells[1], set(cells[2].split()), tests))
    return rows


def test_every_op_has_a_row():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(ops.__all__)


def test_every_test_it_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT.read_text())
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"


def parameters_of(file, test):
    """All values that a test is run with: of its marks, its file's, and its fixtures."""
    module = importlib.import_module(file.removesuffix(".py"))
    function = getattr(module, test)
    of_file = getattr(module, "pytestmark", [])
    marks = [*function.pytestmark] if hasattr(function, "pytestmark") else []
    marks += of_file if isinstance(of_file, list) else [of_file]
    values = [value for mark in marks if mark.name == "parametrize" for value in mark.args[1]]
    for argument in inspect.signature(function).parameters:
        fixture = getattr(getattr(module, argument, None), "_fixture_function_marker", None)
        values += (fixture.params or ()) if fixture else ()
    plain = []
    for value in values:
        given = value.values if hasattr(value, "values") and hasattr(value, "marks") else [value]
        plain += [part for v in given for part in (v if isinstance(v, tuple) else [v])]
    return plain


def test_tests_run_with_the_dtypes_and_on_the_devices_of_their_row():
    rows = matrix()
    assert len(rows) > 25
    for label, wanted, tests in rows:
        found = set()
        for file, test in tests:
            values = parameters_of(file, test)
            found |= {name for name, dtype in DTYPES.items() if dtype in values}
            assert {"cpu", "cuda"} <= {value for value in values if isinstance(value, str)}, test
        assert wanted <= (found or {"f32"}), f"{label}: {tests} run with {sorted(found)}"
