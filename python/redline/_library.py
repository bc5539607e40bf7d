"""Loads the ops library into torch's registry, once."""

from pathlib import Path

import torch

PATH = Path(__file__).parent / "lib" / "libredline_ops.so"


def _load() -> str:
    if not PATH.exists():
        raise ImportError(
            f"redline: {PATH} is not there: run `make build` in the source tree, "
            "or install the wheel"
        )
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        raise ImportError(
            f"redline: {PATH.name} does not load with torch {torch.__version__}: {error}; "
            "a build serves one minor version of torch: build again with this one"
        ) from error
    return torch.ops.redline.version()


__version__ = _load()
