#!/usr/bin/env python3
"""Runs clang-tidy over core and kernels, with the commands of a CMake build folder.

Only sources that g++ compiles without torch are read: a torch file costs minutes. Each kernel is
compiled once per instruction set and read once, as the baseline.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

gcc_only = {"-fno-trapping-math", "-Wno-maybe-uninitialized", "-fno-math-errno"}


def commands(build: Path) -> list[dict]:
    """The compile commands of the files to read, one per file, in words that clang knows."""
    chosen: dict[str, dict] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = Path(entry["file"])
        if "redline/kernels" not in path.as_posix() or path.suffix != ".cpp":
            continue
        if "REDLINE_ISA=" in entry["command"] and "REDLINE_ISA=baseline" not in entry["command"]:
            continue
        words = [word for word in entry["command"].split() if word not in gcc_only]
        if words[0].endswith("ccache"):
            words = words[1:]
        chosen[entry["file"]] = {**entry, "command": " ".join(words)}
    return list(chosen.values())


def read(folder: str, path: str) -> str:
    """What clang-tidy says of a file, or nothing."""
    pinned = Path(sys.executable).with_name("clang-tidy")  # requirements/lint.txt
    program = str(pinned) if pinned.exists() else "clang-tidy"
    command = [program, "--quiet", "-p", folder, path]
    result = subprocess.run(command, capture_output=True, text=True)
    return (result.stdout.strip() or result.stderr.strip()) if result.returncode else ""


def main() -> None:
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "build/make")
    entries = commands(build)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "compile_commands.json").write_text(json.dumps(entries))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(lambda entry: read(folder, entry["file"]), entries))
    findings = [text for text in said if text]
    print("\n".join(findings) or f"clang-tidy: nothing to say of {len(entries)} files")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
