#!/usr/bin/env python3
"""Configures and builds the library in place with the interpreter that runs this file.

build.py                  the library that Python loads
build.py --all            and the C++ API, the examples and the C++ tests
build.py --preset cpu     a preset of CMakePresets.json, in its own build folder
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from check_spills import find_nvcc
from progress import Phase, follow

root = Path(__file__).resolve().parent.parent
library_target = "redline_ops"
quiet_lines = ("ninja: Entering", "ninja: no work", "-- ")  # the last: CMake, run again by Ninja


def leave(sentence: str) -> NoReturn:
    sys.exit(f"redline: {sentence}")


def program(name: str, package: str | None = None) -> str:
    """A build program: from the interpreter's own packages if they have it, or else from PATH."""
    package = package or name
    if importlib.util.find_spec(package) is not None:
        module = importlib.import_module(package)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        candidate = Path(folder or "", name)
        if folder and os.access(candidate, os.X_OK):
            return str(candidate)
    if found := shutil.which(name):
        return found
    leave(f"there is no {name}; install it with: {sys.executable} -m pip install {package}")


def compute_capability() -> str | None:
    """The architecture number of the first GPU, as 90a, or None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True)
    found = re.match(r"(\d+)\.(\d)\s*$", answer.stdout)
    if answer.returncode != 0 or not found:
        return None
    return found[1] + found[2] + ("a" if found[1] == "9" else "")


def command_of(folder: Path, preset: str | None, everything: bool) -> list[str]:
    """How CMake is called."""
    command = [program("cmake"), "-S", str(root)]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
    if preset is not None:
        return [*command, "--preset", preset]
    command += ["-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    if nvcc := find_nvcc():
        command.append(f"-DREDLINE_NVCC={nvcc}")
    if capability := compute_capability():
        command.append(f"-DREDLINE_CUDA_ARCHITECTURES={capability}-real")
    if everything:
        command += ["-DREDLINE_TESTS=ON", "-DREDLINE_CPP_API=ON"]
    return command


def configure(folder: Path, preset: str | None, everything: bool) -> None:
    """Runs CMake, unless the folder was configured so, or for more; Ninja sees later changes."""
    asked, more = (
        "\n".join(command_of(folder, preset, choice)) + "\n" for choice in (everything, True)
    )
    stamp = folder / "configured-with"
    if (folder / "build.ninja").is_file() and stamp.is_file():
        if stamp.read_text() in (asked, more):
            return
        stamp.unlink()
    phase = Phase("configuring")
    lines: list[str] = []
    if follow(asked.splitlines(), lines.append, phase.update) != 0:
        phase.finish("failed")
        leave("CMake failed:\n" + "\n".join(lines[-40:]))
    phase.finish(str(folder.relative_to(root)))
    for line in lines:
        if line.startswith("-- redline:"):
            print("  " + line[3:])
    stamp.write_text(asked)


class NinjaProgress:
    """Turns Ninja's lines into one bar; shows what compilers say."""

    def __init__(self):
        self.phase: Phase | None = None
        self.began = time.monotonic()
        self.done = 0

    def read(self, line: str) -> None:
        if found := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
            self.done = int(found[1])
            self.phase = self.phase or Phase("compiling")
            what = found[3].replace("Building ", "").split("/")[-1]
            self.phase.update(self.done / int(found[2]), f"{found[1]}/{found[2]} {what}")
        elif line.strip() and not line.startswith(quiet_lines):
            if self.phase:
                self.phase.clear()
            print(line, flush=True)

    def tick(self) -> None:
        if self.phase is None and time.monotonic() - self.began > 1:  # there is work to do
            self.phase = Phase("compiling")
        if self.phase:
            self.phase.update()


def compile_library(folder: Path, targets: list[str], jobs: int | None) -> None:
    command = [program("ninja"), "-C", str(folder)]
    command += ["-j", str(jobs)] if jobs else []
    os.environ["NINJA_STATUS"] = "[%f/%t] "
    # The precompiled header is safe to share: its content is hashed.
    os.environ.setdefault(
        "CCACHE_SLOPPINESS", "pch_defines,time_macros,include_file_mtime,include_file_ctime"
    )
    progress = NinjaProgress()
    status = follow([*command, *targets], progress.read, progress.tick)
    if progress.phase:
        progress.phase.finish(f"{progress.done} steps" if status == 0 else "failed")
    if status != 0:
        again = f"ninja -v -C {folder.relative_to(root)}"
        leave(f"the build failed; to see each command: {again}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--all", action="store_true", help="build the C++ API, examples and tests too"
    )
    parser.add_argument("--preset", help="a preset of CMakePresets.json")
    parser.add_argument("--jobs", type=int, help="how many compilers run at once")
    options = parser.parse_args()
    folder = root / "build" / (options.preset or "make")
    try:
        everything = options.all or options.preset is not None
        configure(folder, options.preset, everything)
        compile_library(folder, ["all"] if everything else [library_target], options.jobs)
    except KeyboardInterrupt:
        leave("build interrupted; the next run takes it up again")


if __name__ == "__main__":
    main()
