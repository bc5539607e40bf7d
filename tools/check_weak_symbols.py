#!/usr/bin/env python3
"""Fails where a per-instruction-set object (cpu_baseline, cpu_avx2, ...) defines a weak function.

The linker keeps one copy of a weak function. If that is the copy compiled for AVX-512, it runs on
every machine, and on most it stops the program.
"""

import re
import subprocess
import sys
from pathlib import Path


def objects(build: Path) -> list[Path]:
    """The objects of the cpu_* targets under a CMake build folder."""
    return sorted(path for path in build.rglob("*.o") if re.search(r"/cpu_\w+\.dir/", str(path)))


def weak_functions(path: Path) -> list[str]:
    """The weak functions that an object defines; a weak datum (V, u) holds no instructions."""
    command = ["nm", "--defined-only", "--demangle", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [match[1] for match in re.finditer(r"^[0-9a-f]+ W (.+)$", listing, re.MULTILINE)]


def check(build: Path) -> list[str]:
    found = objects(build)
    if not found:
        return [f"{build}: no object of a cpu_* target; build the library first"]
    return [f"{path}: weak function {name}" for path in found for name in weak_functions(path)]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/make")
    faults = check(folder)
    print("\n".join(faults) or f"weak symbols: none in {len(objects(folder))} objects")
    sys.exit(bool(faults))
