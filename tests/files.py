"""Files that tests make."""

from pathlib import Path


def plant(root: Path, name: str, text: str) -> Path:
    """Writes `text` to `name` under `root`, whose folders are made on the way."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
