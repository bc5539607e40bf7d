"""examples/megatron/train_gpt.py: it trains, and says how fast, how large and how near."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SIZES = {"steps": 14, "batch": 2, "sequence": 32, "layers": 2, "hidden": 64, "ffn": 96}
SIZES |= {"heads": 4, "kv-heads": 2, "vocabulary": 512, "learning-rate": 3e-3}


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not here")
def test_it_trains():
    pytest.importorskip("tokenizers", reason="its default text is learnt by tokenizers")
    program = [sys.executable, "-W", "ignore", ROOT / "examples/megatron/train_gpt.py"]
    options = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    path = os.pathsep.join([str(ROOT / "python"), os.getenv("PYTHONPATH", "")])
    ran = subprocess.run(
        [*program, *options, "--text", ROOT / "docs"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
    line = next(line for line in ran.stdout.splitlines() if line.startswith("transformer_engine"))
    speed, peak, first, last = line.removeprefix("transformer_engine on Redline").split()
    assert float(speed) > 0
    assert float(last) < float(first) - 0.1
    if torch.cuda.is_available():
        assert float(peak) > 0
        found = re.search(r"largest loss difference: (\S+) in 14 steps", ran.stdout)
        assert float(found[1]) < 5e-2
    else:
        assert peak == "-"
        assert "local spec: not trained: Megatron's own attention asks for CUDA" in ran.stderr
