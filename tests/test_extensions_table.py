"""docs/megatron.md says what the code says, of every public name."""

import subprocess
import sys
from pathlib import Path

import pytest

from redline.extensions import transformer_engine as te
from redline.extensions.transformer_engine.table import ENTRIES

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "write_megatron_table.py"


def test_every_name_says_what_stands_behind_it():
    assert sorted(ENTRIES) == sorted(te.__all__)
    assert {entry.status for entry in ENTRIES.values()} == {"works", "composition", "refused"}


def test_the_page_is_up_to_date():
    ran = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", [name for name, e in ENTRIES.items() if e.status == "refused"])
def test_refused_names_refuse(name):
    with pytest.raises(NotImplementedError, match=f"^{name}: .*; .* works"):
        getattr(te, name)()


@pytest.mark.parametrize("name", te.__all__)
def test_every_name_explains_itself(name):
    if name != "HAVE_TE":
        assert getattr(te, name).__doc__
        assert getattr(te, name).__module__ == te.__name__
