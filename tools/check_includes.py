#!/usr/bin/env python3
"""Fails where a folder includes what it may not. The table is the architecture."""

import re
import sys
from pathlib import Path

may_include = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "ops": {"core", "kernels", "ops"},
    "parallel": {"ops", "parallel"},
    "layers": {"ops", "parallel", "layers"},
    "extensions": {"layers", "parallel", "extensions"},
    "transformer": {"extensions"},
}
may_see_torch = {"ops", "parallel", "layers", "extensions", "transformer"}
torch_folders = {"torch", "ATen", "c10"}
sources = {".h", ".cuh", ".cpp", ".cu"}


def faults_of_include(path: Path, folder: str, included: str) -> list[str]:
    """What is wrong with one include, in words."""
    parts = included.split("/")
    faults = []
    if parts[0] in torch_folders and folder not in may_see_torch:
        faults.append(f"{folder}/ knows nothing about torch")
    if parts[0] == "redline" and parts[1] not in may_include[folder]:
        faults.append(f"not allowed in {folder}/")
    if "device" in path.parts and parts[0] == "redline" and "device" not in parts:
        faults.append("device/ includes device/ only")
    if "cpu" in path.parts and parts[0].startswith(("cuda", "cub")):
        faults.append("cpu/ knows nothing about CUDA")
    return faults


def check(root: Path) -> list[str]:
    """Faults of all sources under `root`, a tree that holds redline/."""
    faults = []
    for path in sorted((root / "redline").rglob("*")):
        if path.suffix not in sources:
            continue
        inner = path.relative_to(root / "redline")
        folder = inner.parts[0]
        if folder not in may_include:
            faults.append(f"{path}: the folder {folder}/ has no rule; add it to the table")
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := re.match(r'\s*#\s*include\s*[<"]([^>"]+)', line):
                where = f"{path}:{number}: {found[1]}: "
                faults += [where + fault for fault in faults_of_include(inner, folder, found[1])]
    return faults


if __name__ == "__main__":
    found = check(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    print("\n".join(found) if found else "includes: the walls stand")
    sys.exit(bool(found))
