#!/usr/bin/env python3
"""Makes .venv with the pinned packages, or checks that a given interpreter has what is needed.

    setup_environment.py runtime build test     makes or completes .venv
    setup_environment.py --check build          checks the interpreter that runs this file

A group is complete when its stamp holds the hash of its requirements. While pip runs there is a
mark; where it is left behind, pip was interrupted, perhaps in the middle of a package, and .venv is
made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from progress import Phase, follow

root = Path(__file__).resolve().parent.parent
environment = root / ".venv"
stamps = environment / "redline-setup"  # this folder also says: made by this tool
oldest_python = (3, 10)
pip_version = "26.3"  # the first lines that --progress-bar raw prints are from 24.1

# What the pinned packages weigh on Linux x86-64. It scales the bar and decides nothing.
torch_bytes = 2.73e9
download_bytes = {"runtime": 73e6, "build": 31e6, "test": 2e6, "lint": 45e6}

# The modules that a group's packages bring; `ninja` and `cmake` may also be programs on PATH.
# libcst is of the runtime, and `make dyno` does without it.
modules = {
    "runtime": [
        "torch",
        "numpy",
        "typer",
        "rich",
        "matplotlib",
        "jinja2",
        "tokenizers",
        "safetensors",
    ],
    "build": ["torch", "cmake", "ninja"],
    "test": ["pytest", "hypothesis", "expecttest", "pytest_timeout", "libcst"],
    "lint": ["pre_commit", "ruff", "codespell_lib", "cmakelang", "yaml"],
}
programs = {"cmake", "ninja"}


def leave(sentence: str) -> NoReturn:
    sys.exit(f"redline: {sentence}")


def digest(group: str) -> str:
    """What a group's stamp holds: a hash of its requirements, constraints and interpreter."""
    files = [root / "requirements" / f"{group}.txt", root / "requirements" / "constraints.txt"]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def is_complete(group: str) -> bool:
    stamp = stamps / group
    if not stamp.is_file() or (stamps / "unfinished").exists():
        return False
    return stamp.read_text().strip() == digest(group)


def check_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < oldest_python:
        leave(f"Python 3.10 or newer is needed, and {sys.executable} is {version}.")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        leave(f"{sys.executable} has no {missing[0]}; on Debian: apt install python3-venv")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        leave("there is no C++ compiler; on Debian: apt install g++")


def check(groups: list[str]) -> None:
    """Says which package the interpreter lacks, and how to get it."""
    wanted = [name for group in groups for name in modules[group]]
    missing = [
        name
        for name in wanted
        if importlib.util.find_spec(name) is None
        and not (name in programs and shutil.which(name) is not None)
    ]
    if missing:
        files = " ".join(f"-r requirements/{group}.txt" for group in groups)
        leave(
            f"{sys.executable} has no {', '.join(missing)}; "
            f"install with: {sys.executable} -m pip install {files}"
        )


class PipProgress:
    """Reads what pip prints and moves two bars: bytes fetched, then packages put in place."""

    def __init__(self, groups: list[str], log):
        self.expected = sum(download_bytes[group] for group in groups)
        if {"runtime", "build"} & set(groups) and not list(environment.glob("lib/*/*/torch")):
            self.expected += torch_bytes
        self.log = log
        self.sizes: dict[str, float] = {}
        self.fetched = 0.0
        self.current = ("", 0.0)
        self.names: list[str] = []
        self.phase = Phase("fetching packages")

    def read(self, line: str) -> None:
        if found := re.match(r"Progress (\d+) of (\d+)", line):
            fraction = (self.fetched + float(found[1])) / self.expected
            self.phase.update(min(fraction, 0.99))
            return
        print(line, file=self.log, flush=True)
        if found := re.match(
            r"\s*(?:Downloading|Using cached) (\S+?)-\d\S* \(([\d.]+) (\w?B)\)", line
        ):
            self.fetched += self.current[1]
            size = float(found[2]) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[found[3]]
            self.current = (found[1], size)
            self.sizes[found[1].lower().replace("-", "_")] = size
            self.phase.update(note=f"{found[1]} {found[2]} {found[3]}")
        elif line.startswith("Installing collected packages:"):
            self.names = re.findall(r"[\w.-]+", line.split(":", 1)[1])
            fetched = self.fetched + self.current[1]
            self.phase.finish(f"{len(self.names)} packages, {fetched / 1e6:,.0f} MB")
            self.phase = Phase("installing packages")

    def tick(self) -> None:
        if not self.names:
            self.phase.update()
            return
        weights = {name.lower().replace("-", "_"): 1e5 for name in self.names}
        weights |= {name: size for name, size in self.sizes.items() if name in weights}
        placed = {
            path.name.split("-")[0].lower() for path in environment.glob("lib/*/*/*.dist-info")
        }
        done = [name for name in weights if name in placed]
        fraction = sum(weights[name] for name in done) / sum(weights.values())
        self.phase.update(fraction, f"{len(done)} of {len(weights)}")


def make_environment() -> None:
    """A fresh .venv. A half-made one is thrown away; a stranger's is not touched."""
    if environment.exists() and not stamps.is_dir():
        leave(
            ".venv exists and was not made by make; move it away, or use it as it is: "
            "PYTHON=.venv/bin/python make dyno"
        )
    shutil.rmtree(environment, ignore_errors=True)
    stamps.mkdir(parents=True)
    phase = Phase("creating .venv")
    run([sys.executable, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    run([*pip, "install", "--quiet", "--disable-pip-version-check", f"pip=={pip_version}"])
    (stamps / "venv").write_text(sys.version + "\n")
    phase.finish(f"Python {sys.version.split()[0]}")


def run(command: list[str]) -> None:
    lines: list[str] = []
    if follow(command, lines.append, lambda: None) != 0:
        leave(f"{' '.join(command)} failed:\n" + "\n".join(lines[-15:]))


def install(groups: list[str]) -> None:
    unfinished = stamps / "unfinished"
    unfinished.touch()
    files = [
        word for group in groups for word in ("-r", str(root / "requirements" / f"{group}.txt"))
    ]
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "raw",
               "--disable-pip-version-check", "--no-input", *files]  # fmt: skip
    log_path = stamps / "pip.log"
    with open(log_path, "w") as log:
        progress = PipProgress(groups, log)
        status = follow(command, progress.read, progress.tick)
    progress.phase.finish("" if status == 0 else "failed")
    if status != 0:
        leave(f"pip failed; the end of {log_path}:\n" + tail(log_path))
    for group in groups:
        aside = stamps / f"{group}.part"
        aside.write_text(digest(group) + "\n")
        os.replace(aside, stamps / group)
    unfinished.unlink()


def tail(path: Path) -> str:
    return "\n".join(path.read_text().splitlines()[-15:])


def set_up(groups: list[str]) -> None:
    if environment.is_symlink():  # a shared environment, kept by somebody else
        command = [str(environment / "bin" / "python"), __file__, "--check", *groups]
        sys.exit(subprocess.run(command).returncode)
    missing = [group for group in groups if not is_complete(group)]
    if not missing:
        return
    check_python()
    made_with = stamps / "venv"
    unfinished = (stamps / "unfinished").exists()
    if unfinished or not made_with.is_file() or made_with.read_text() != sys.version + "\n":
        make_environment()
        missing = groups
    print(f"redline: setting up .venv ({', '.join(missing)}); this happens once", flush=True)
    install(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="check this interpreter; install nothing"
    )
    parser.add_argument("groups", nargs="+", choices=sorted(modules))
    options = parser.parse_args()
    try:
        check(options.groups) if options.check else set_up(options.groups)
    except KeyboardInterrupt:
        leave("set-up interrupted; the next run takes it up again")


if __name__ == "__main__":
    main()
