#!/usr/bin/env python3
"""Runs the C++ tests (ctest), then the Python tests (pytest); says what was skipped and why.

Arguments go to pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from build import program

root = Path(__file__).resolve().parent.parent
folder = root / "build" / "make"


def run_cpp() -> tuple[int, list[str]]:
    """The exit status of ctest, and a line per skipped test."""
    command = [program("ctest", "cmake"), "--test-dir", str(folder), "--output-on-failure"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    skipped = []
    found_none = False
    for line in process.stdout:
        print(line, end="", flush=True)
        found_none |= "No tests were found" in line
        if found := re.match(
            r"\s*\d+/\d+ Test\s+#\d+: (\S+) \.*\s*\*\*\*(?:Skipped|Not Run)", line
        ):
            skipped.append(f"{found[1]}: it says why above")
    status = process.wait()
    if found_none:
        files = sorted(path.stem for path in (root / "tests" / "cpp").glob("test_*.cpp"))
        why = "GoogleTest was not found; on Debian: apt install libgtest-dev"
        return 0, [f"tests/cpp ({', '.join(files)}): {why}"]
    return status, skipped


def main() -> None:
    cpp_status, cpp_skipped = run_cpp()
    command = [sys.executable, "-m", "pytest", "-rs", *(sys.argv[1:] or ["tests"])]
    python_status = subprocess.run(command, cwd=root).returncode
    print("C++ tests:", "passed" if cpp_status == 0 else "FAILED", f"({len(cpp_skipped)} skipped)")
    for line in cpp_skipped:
        print("  skipped", line)
    print("Python tests:", "passed" if python_status == 0 else "FAILED", "(skips are listed above)")
    sys.exit(cpp_status or python_status)


if __name__ == "__main__":
    main()
