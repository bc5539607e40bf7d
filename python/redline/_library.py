"""Loads the ops library into torch's registry, once."""

import filecmp
from pathlib import Path

import torch

PATH = Path(__file__).parent / "lib" / "libredline_ops.so"


def _loaded() -> Path | None:
    """The ops library that this process has already, by whomever it was loaded."""
    if not hasattr(torch.ops.redline, "version"):
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next((Path(line.split()[-1]) for line in lines if line.endswith(PATH.name)), None)


def _load() -> str:
    if not PATH.exists():
        raise ImportError(
            f"redline: {PATH} is not there: run `make build` in the source tree, "
            "or install the wheel"
        )
    loaded = _loaded()
    if loaded is not None and not filecmp.cmp(loaded, PATH, shallow=False):
        raise ImportError(
            f"redline: two copies are in this process: {loaded} ({torch.ops.redline.version()}) is "
            f"loaded, and {PATH} is another build: keep one of them"
        )
    try:
        torch.ops.load_library(str(loaded or PATH))
    except OSError as error:
        raise ImportError(
            f"redline: {PATH.name} does not load with torch {torch.__version__}: {error}; "
            "a build serves one minor version of torch: build again with this one"
        ) from error
    return torch.ops.redline.version()


__version__ = _load()
