"""Parts of Redline copied into a folder of their own: what they do there needs no torch."""

import os
import subprocess
from pathlib import Path

source = Path(__file__).parents[1] / "python"


def plant(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def copy(root: Path, *modules: str) -> None:
    for module in modules:
        name = f"{module.replace('.', '/')}.py"
        plant(root, name, (source / name).read_text())


def start(python: str, roots: list[Path], *words, **options) -> subprocess.CompletedProcess:
    """Runs `python …` with the folders on its path; `variables` are added to the environment."""
    path = {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    environment = os.environ | path | options.pop("variables", {})
    command = [python, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)
