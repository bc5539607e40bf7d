"""REDLINE_LOG=kernels: the first launch of each choice on stderr, and no other effect."""

import os
import subprocess
import sys
from pathlib import Path

import redline

PROGRAM = """
import torch
from redline import ops
torch.set_num_threads(2)
torch.manual_seed(0)
for rows in (64, 64, 4096):
    x = torch.randn(rows, 256, requires_grad=True)
    ops.linear(x, torch.ones(8, 256)).sum().backward()  # of torch: not logged
    y = ops.rms_norm(x, torch.ones(256))
    y.backward(torch.ones_like(y))
    ops.softmax(torch.ones(256, 4).t())
    ops.softmax(torch.ones(256, 4).t())
print(y.sum().item(), x.grad.double().square().sum().item())
"""


def ran(**environment):
    path = str(Path(redline.__file__).parents[1])
    clean = {k: v for k, v in os.environ.items() if k != "REDLINE_LOG"}
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": path} | environment,
    )
    assert program.returncode == 0, program.stderr
    return program.stdout, program.stderr.splitlines()


def test_each_choice_is_logged_once_and_nothing_else_changes():
    numbers, silent = ran()
    assert silent == []
    logged_numbers, lines = ran(REDLINE_LOG="kernels")
    assert logged_numbers == numbers
    assert len(lines) == len(set(lines)) and all(line.startswith("redline: ") for line in lines)
    forward = [line for line in lines if "rms_norm_forward" in line]
    assert forward == [
        "redline: rms_norm_forward: cpu kernel, 1 tasks, 1 threads: up to 255 rows, "
        "about 256 KB, a task"
    ]
    assert sum("rms_norm_backward" in line for line in lines) == 2  # chunks, then their sum
    assert [line for line in lines if "fallback" in line] == [
        "redline: fallback: softmax: scores: sizes [4, 256] with strides [1, 4] are copied to lie "
        "side by side; give it contiguous"
    ]
    assert ran(REDLINE_LOG="anything") == (numbers, [])
