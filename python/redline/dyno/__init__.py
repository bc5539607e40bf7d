"""The dyno: a GPT trained with stock and with tuned parts, and every part measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda")
# No float16: with weights of float16 stock itself reaches NaN within 12 steps.
DTYPES = {
    "auto": None,
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


@dataclass(frozen=True)
class Options:
    steps: int = 40
    device: str = "auto"
    dtype: str = "auto"
    text: Path | None = None
    out: Path = Path("dyno")
    compile_parts: int = 6
    command: str = "redline dyno"


def run(options: Options) -> int:
    """Runs the whole job; 0, or 1 where the loss curves differ beyond the bound."""
    from .job import run_job

    return run_job(options)
