"""docs/migration.md: its commands are run, and print what it says that they print."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import light
from test_run import MEGATRON

pytest.importorskip("libcst", reason="needs libcst: pip install libcst")

DOCUMENT = Path(__file__).parents[1] / "docs/migration.md"
MODULES = (
    "__init__ __main__ cli run signpost move.__init__ move.cpp move.files move.python move.report "
    "move.search megatron.old_address transformer.custom_layers.transformer_engine"
)
BLOCK = re.compile(r"^( *)```(\w+)(?: (\S+))?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
ADDRESS = "class TENorm: pass\n\nclass TELinear: pass\n"


def sections() -> dict[str, list[tuple[str, str, str]]]:
    """By section, the kind, name and text of its fenced blocks."""
    found = {}
    for part in DOCUMENT.read_text().split("\n## ")[1:]:
        title = part.partition("\n")[0]
        blocks = BLOCK.findall(part)
        found[title] = [(kind, name, textwrap.dedent(text)) for _, kind, name, text in blocks]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """`python` and `redline` on PATH, over a Redline without torch and a Megatron without its old
    address."""
    root = tmp_path_factory.mktemp("light")
    light.copy(root, *(f"redline.{module}" for module in MODULES.split()))
    light.plant(root, "redline/megatron/__init__.py", MEGATRON)
    light.plant(root, "redline/extensions/transformer_engine.py", ADDRESS)
    for package in ("", "/transformer", "/extensions"):
        light.plant(root, f"megatron/core{package}/__init__.py", "")
    light.plant(root, "megatron/core/extensions/transformer_engine.py", ADDRESS)
    for name, command in {"python": "", "redline": " -m redline"}.items():
        script = light.plant(
            root, f"bin/{name}", f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n'
        )
        script.chmod(0o755)
    path = f"{root / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(root), "PATH": path, "PYTHONUNBUFFERED": "1"}


def session(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it prints."""
    told = []
    for line in text.splitlines():
        if line.startswith("$ "):
            told.append((line[2:], []))
        else:
            told[-1][1].append(line)
    return told


@pytest.mark.parametrize("title", ["The old address", "Megatron-Core's old address"])
def test_the_commands_print_what_the_document_says(title, environment, tmp_path):
    blocks = sections()[title]
    for kind, name, text in blocks:
        if kind == "python" and name:
            light.plant(tmp_path, name, text)
    commands = [step for kind, _, text in blocks if kind == "console" for step in session(text)]
    assert commands
    for command, expected in commands:
        ran = subprocess.run(
            command,
            shell=True,
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        told = ran.stdout.replace(str(tmp_path), "/home/you")
        assert [line.rstrip() for line in told.splitlines()] == expected, command
        assert ran.returncode == 0, command
