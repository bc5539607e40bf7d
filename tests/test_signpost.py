"""The old address: it warns at each line that takes a name from it, and forwards everything."""

import importlib
import pickle
import pydoc
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import light
import pythons
from redline import signpost
from redline.extensions import transformer_engine as new

OLD = "redline.transformer.custom_layers.transformer_engine"
NEW = "redline.extensions.transformer_engine"
NOTICE = (
    f"{OLD} has moved to {NEW}: import from there. "
    "The old address will be removed in Redline 2.0; `redline move` rewrites the imports"
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def never_imported(monkeypatch):
    """The old address as a process finds it that has not yet asked for it."""
    package = importlib.import_module(OLD.rpartition(".")[0])
    monkeypatch.delattr(package, "transformer_engine", raising=False)
    monkeypatch.delitem(sys.modules, OLD, raising=False)
    monkeypatch.setattr(signpost, "seen", {})


def warned(text: str, module: str = "program") -> list[int]:
    """Runs a program; the lines that its warnings point at."""
    names = {"__name__": module, "OLD": OLD}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(text, "program.py", "exec"), names)
    notices = [w for w in caught if w.category is DeprecationWarning]
    assert {str(w.message) for w in notices} <= {NOTICE}
    assert {w.filename for w in notices} <= {"program.py"}
    return [w.lineno for w in notices]


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        (f"import {OLD}", [1]),
        (f"import {OLD} as te\n\nte.TENorm\n\nte.TELinear", [1, 3, 5]),
        (f"\nfrom {OLD} import TENorm, TELinear", [2]),
        (f"from {OLD} import (\n    TENorm,\n    TELinear as L,\n)", [1]),
        (f"from {OLD} import *\nTENorm", [1]),
        (f"import {OLD}\nfrom {OLD} import *", [1, 2]),
        (f"from {OLD} import TENorm\nfrom {OLD} import TENorm", [1, 2]),
        (f"from {OLD.rpartition('.')[0]} import transformer_engine as te\nte.TENorm", [1, 2]),
        ("import importlib\nte = importlib.import_module(OLD)\ngetattr(te, 'TENorm')", [2, 3]),
        ("import pickle\nname = f'c{OLD}\\nTENorm\\n.'.encode()\npickle.loads(name)", [3]),
        ("import pickle\nname = f'c{OLD}\\nTENorm\\n.'.encode()\npickle._loads(name)", [3]),
        (f"import {OLD} as te\nfor _ in range(2):\n    te.TENorm", [1, 3, 3]),
        (f"def f():\n    import {OLD} as te\n    return te.TENorm, te.TELinear\nf()", [2, 3]),
        (f"import {OLD} as te\nhasattr(te, 'TENothing')\nte.__doc__\ndir(te)", [1]),
    ],
)
def test_each_line_that_takes_a_name_warns_once(program, lines):
    assert warned(program) == lines
    assert [(str(use.path), use.line) for use in signpost.seen] == [
        ("program.py", line) for line in dict.fromkeys(lines)
    ]


def test_a_checkpoint_warns_where_it_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "norm.pt"
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(new.TENorm, "__module__", OLD)
        torch.save(new.TENorm, path)
    loading = f"import torch\n\nnorm = torch.load({str(path)!r}, weights_only=False)"
    assert warned(loading) == [3]


def test_every_public_name_is_the_new_addresss_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = importlib.import_module(OLD)
        for name in (*new.__all__, "__all__"):
            assert getattr(old, name) is getattr(new, name)
        taken = {}
        exec(f"from {OLD} import *", taken)
    assert set(new.__all__) == {name for name in taken if not name.startswith("__")}


def test_what_was_pickled_under_the_old_address_is_loaded(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(OLD)
        with monkeypatch.context() as patch:
            patch.setattr(new.TENorm, "__module__", OLD)
            pickled = pickle.dumps(new.TENorm)
        assert OLD.encode() in pickled
        assert pickle.loads(pickled) is new.TENorm


def test_dir_and_help_tell_of_the_new_address_and_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = importlib.import_module(OLD)
        warnings.simplefilter("error")
        assert dir(old) == dir(new)
        page = pydoc.plain(pydoc.render_doc(old))
    assert all(name in page for name in new.__all__)


def test_a_type_checker_sees_the_new_address():
    stub = ROOT / "python" / f"{OLD.replace('.', '/')}.pyi"
    taken = {}
    exec(stub.read_text(), taken)
    assert all(taken[name] is getattr(new, name) for name in new.__all__)
    assert (ROOT / "python/redline/py.typed").exists()


@pytest.mark.parametrize("again", [1, 2])
def test_an_error_is_raised_at_the_users_line(again):
    program = compile(f"\nfrom {OLD} import TENorm", "program.py", "exec")
    for _ in range(again):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="program", category=DeprecationWarning)
            with pytest.raises(DeprecationWarning, match="has moved") as caught:
                exec(program, {"__name__": "program"})
        assert [at.lineno for at in caught.traceback if str(at.path) == "program.py"] == [1]
        assert OLD not in sys.modules


def test_an_error_asked_for_in_redline_is_not_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="redline", category=DeprecationWarning)
        exec(f"from {OLD} import TENorm", {"__name__": "program"})


def test_a_name_that_is_nowhere_is_missed_at_the_old_address():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = importlib.import_module(OLD)
    with pytest.raises(AttributeError, match=f"^module '{OLD}' has no attribute 'TENothing'$"):
        _ = old.TENothing
    with pytest.raises(ImportError, match=f"cannot import name 'TENothing' from '{OLD}'"):
        exec(f"from {OLD} import TENothing", {})


def test_custom_layers_is_an_empty_front_desk():
    package = importlib.import_module("redline.transformer.custom_layers")
    assert Path(package.__file__).read_text() == ""


# --- as a process sees it, on every Python at hand ------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """Redline's signpost over a small new address, without torch."""
    root = tmp_path / "light"
    light.copy(root, "redline.signpost", OLD)
    light.plant(root, f"{NEW.replace('.', '/')}.py", "TENorm = 1\n")
    return root


@pytest.mark.parametrize("version", pythons.at_hand)
def test_a_program_shows_the_notice_at_its_line(version, root, tmp_path):
    python = pythons.at_hand[version]
    program = tmp_path / "program.py"
    program.write_text(f"\nfrom {OLD} import TENorm, TENorm as N\nfrom {OLD} import TENorm\n")
    ran = light.start(python, [root], program)
    told = [line for line in ran.stderr.splitlines() if "DeprecationWarning" in line]
    assert told == [f"{program}:{line}: DeprecationWarning: {NOTICE}" for line in (2, 3)]
    strict = light.start(python, [root], "-W", "error", program)
    assert strict.returncode == 1
    assert f'File "{program}", line 2, in <module>' in strict.stderr
    assert strict.stderr.splitlines()[-1] == f"DeprecationWarning: {NOTICE}"


def test_who_never_imports_it_does_not_load_it(root):
    asked = f"import sys, {NEW}\nprint([name for name in sys.modules if 'redline' in name])"
    loaded = light.start(sys.executable, [root], "-c", asked).stdout
    assert NEW in loaded
    assert "signpost" not in loaded
    assert "custom_layers" not in loaded


# --- C++ ------------------------------------------------------------------------------------------

ADDRESS = """
#pragma once
namespace redline::extensions {
inline namespace transformer_engine {
struct TENorm {};
}  // namespace transformer_engine
}  // namespace redline::extensions
"""
HEADER = "redline/transformer/custom_layers/transformer_engine.h"
USER = f"""
#include "{HEADER}"
#include "{HEADER}"
#include "redline/extensions/transformer_engine.h"
namespace old_address = redline::transformer::custom_layers::transformer_engine;
old_address::TENorm norm;
redline::extensions::TENorm& same = norm;
using redline::transformer::custom_layers::transformer_engine::TENorm;
TENorm& again = same;
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_old_header_tells_once_and_gives_the_same_types(tmp_path):
    # A stand-in for the new header comes first: torch's headers are not needed for this.
    address = tmp_path / "redline/extensions/transformer_engine.h"
    address.parent.mkdir(parents=True)
    address.write_text(ADDRESS)
    program = tmp_path / "program.cpp"
    program.write_text(USER)
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    command = ["g++", "-std=c++20", *strict, "-I", tmp_path, "-I", ROOT]
    ran = subprocess.run([*command, program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if "note: " in line]
    (notice,) = told
    for part in (HEADER, "redline/extensions/transformer_engine.h", "2.0", "redline move"):
        assert part in notice
    quiet = [*command, "-DREDLINE_OLD_ADDRESS_QUIET", program]
    assert subprocess.run(quiet, capture_output=True, text=True, check=True).stderr == ""
