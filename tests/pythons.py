"""The Pythons at hand, by version: the one that runs the tests, those on PATH and pyenv's."""

import shutil
import subprocess
import sys
from pathlib import Path

ours = f"{sys.version_info.major}.{sys.version_info.minor}"


def _version(python: str) -> str:
    asking = "import sys; print(*sys.version_info[:2], sep='.')"
    ran = subprocess.run([python, "-c", asking], capture_output=True, text=True)
    return ran.stdout.strip()


def _found() -> dict[str, str]:
    named = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    kept = sorted(map(str, Path.home().glob(".pyenv/versions/3.1?.*/bin/python")))
    found = {_version(python): python for python in [*kept, *filter(None, named)]}
    return {version: path for version, path in found.items() if version} | {ours: sys.executable}


at_hand = _found()
