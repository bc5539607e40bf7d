"""`redline doctor` finds what is planted, and works where things are missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from files import plant
from redline import doctor, move

package = Path(doctor.__file__).resolve().parent


def finding(name: str) -> doctor.Finding:
    (found,) = [finding for finding in doctor.doctor() if finding.name == name]
    return found


def test_everything_is_looked_for():
    names = [found.name for found in doctor.doctor()]
    assert names == [
        "Python",
        "compiler",
        "build tools",
        "CUDA toolkit",
        "driver",
        "torch",
        "capability",
        "library",
        "instruction set",
    ]


def test_each_finding_says_what_is_there_or_what_to_do():
    for found in doctor.doctor():
        assert found.found or found.missing
        assert bool(found.missing) <= bool(found.mend)


def test_the_library_and_its_instruction_set_are_found():
    assert "libredline_ops.so" in finding("library").found
    assert finding("instruction set").found.split()[0] in ("baseline", "avx2", "avx512")


def test_an_empty_path_misses_the_tools(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    compiler = finding("compiler")
    assert compiler.missing.startswith("no C++ compiler")
    assert compiler.mend == "apt install g++"
    assert not finding("driver").found
    assert not compiler.needed


def test_a_toolkit_among_the_packages_is_found(monkeypatch, tmp_path):
    nvcc = plant(tmp_path, "nvidia/cu13/bin/nvcc", "#!/bin/sh\necho release 13.0,\n")
    nvcc.chmod(0o755)
    which = shutil.which

    def planted_alone(name, path=None):  # the machine's own toolkits are not there
        return which(name, path=path) if str(tmp_path) in (path or "") else None

    monkeypatch.setattr(doctor.shutil, "which", planted_alone)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor.find_nvcc() == str(nvcc)


def test_an_old_toolkit_is_named(monkeypatch):
    answer = "Cuda compilation tools, release 11.8, V11.8.89"
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "output_of", lambda *command: answer)
    found = doctor.find_toolkit()
    assert found.found.endswith("release 11.8")
    assert found.missing == "older than 12.8"


def test_a_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.find_torch()
    assert found.needed
    assert "does not import" in found.missing
    assert "pip install 'torch==2.11.*'" in found.mend


def test_run_prints_and_succeeds(capsys):
    assert doctor.run() == 0
    printed = capsys.readouterr().out
    assert "instruction set" in printed
    assert "✗" not in printed


def test_it_runs_where_the_library_is_not_built(tmp_path):
    copy = tmp_path / "redline"
    for name in ("__init__.py", "_library.py", "doctor.py"):
        copy.mkdir(exist_ok=True)
        (copy / name).write_text((package / name).read_text())
    command = [sys.executable, "-c", "import sys, redline.doctor; sys.exit(redline.doctor.run())"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "to mend: make build" in result.stdout
    assert "Traceback" not in result.stderr


# --- the old address ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import redline.transformer.custom_layers.transformer_engine",
        "import megatron.core.transformer.custom_layers.transformer_engine as te",
        "from megatron.core.transformer.custom_layers.transformer_engine import TENorm",
        "from megatron.core.transformer.custom_layers import transformer_engine",
        "x = megatron.core.transformer.custom_layers.transformer_engine.TENorm",
        "x = 'megatron.core.transformer.custom_layers.transformer_engine.TENorm'",
        "importlib.import_module('redline.transformer.custom_layers.transformer_engine')",
        "def f():\n    try:\n        from redline.transformer.custom_layers import x\n"
        "    finally:\n        pass",
    ],
)
def test_an_import_of_the_old_address_is_found(tmp_path, statement):
    path = plant(tmp_path, "train.py", "import importlib\n" + statement + "\n")
    ((found,), unread) = move.find(path)
    assert "transformer.custom_layers" in found.address
    assert found.line == 2 + statement[: statement.find("custom_layers")].count("\n")
    assert found.replacement == found.address.replace("transformer.custom_layers", "extensions")
    assert unread == []


@pytest.mark.parametrize(
    "statement",
    [
        "from redline.extensions.transformer_engine import TENorm",
        "import megatron.core.transformer.custom_layers_of_mine",
        "from megatron.core.transformer.custom_layers import batch_invariant_kernels",
        "text = 'import redline.transformer.custom_layers'",
        "from . import custom_layers",
    ],
)
def test_other_imports_are_left_alone(tmp_path, statement):
    assert move.find(plant(tmp_path, "train.py", statement)) == ([], [])


def test_a_folder_is_searched_and_its_environments_are_not(tmp_path):
    old = "from redline.transformer.custom_layers.transformer_engine import TENorm\n"
    plant(tmp_path, "src/a.py", old)
    plant(tmp_path, ".venv/lib/b.py", old)
    include = "redline/transformer/custom_layers/transformer_engine.h"
    plant(tmp_path, "src/c.cpp", f'#pragma once\n#include "{include}"\n')
    found, unread = move.find(tmp_path)
    assert [(old.path.name, old.line) for old in found] == [("a.py", 1), ("c.cpp", 2)]
    assert found[1].replacement == "redline/extensions/transformer_engine.h"
    assert unread == []


def test_a_file_that_is_not_python_is_told_and_passed_over(tmp_path):
    plant(tmp_path, "a.py", "def f(:  # custom_layers\n")
    plant(tmp_path, "b.py", "import redline.transformer.custom_layers\n")
    found, unread = move.find(tmp_path)
    assert len(found) == 1
    assert "a.py: not read: " in unread[0]


def test_run_lists_the_imports_and_the_new_address(tmp_path, capsys):
    plant(tmp_path, "a.py", "import redline.transformer.custom_layers.transformer_engine as te\n")
    assert doctor.run(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "1 import of the old address" in printed
    assert "import instead: redline.extensions.transformer_engine" in printed
    assert printed.endswith(f"to rewrite them: redline move --write {tmp_path}\n")


def test_run_on_a_missing_path_is_one_line_and_an_error(tmp_path, capsys):
    assert doctor.run(tmp_path / "nowhere") == 1
    assert "no such file or folder" in capsys.readouterr().out
