"""docs/determinism.md names every op, and tests that exist."""

import re
from pathlib import Path

from redline import ops

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "determinism.md"


def test_every_op_has_a_row():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(ops.__all__)


def test_every_test_it_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT.read_text())
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"
