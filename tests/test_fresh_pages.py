"""On a CPU an output of 32 MB and more asks for large pages; a smaller one, whose memory glibc
keeps, does not. Read from what the kernel says of the process' mappings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from redline import ops

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not SWITCH.exists() or not Path("/proc/self/smaps").exists(),
    reason="this kernel has no transparent large pages, or does not tell of mappings",
)
LARGE = 2 << 20


def flags_at(address):
    """VmFlags of the mapping that holds an address: `hg` where large pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def outputs_of(cols):
    """Of several ops, each by a way of its own to say the size: [4096, cols] float32 or less."""
    x, weight = torch.randn(4096, cols), torch.ones(cols)
    tokens = torch.zeros(4096, dtype=torch.long)
    yield "rms_norm", ops.rms_norm(x, weight)
    yield "activation", ops.activation(x, kind="silu")
    yield "gated_activation", ops.gated_activation(torch.randn(4096, 2 * cols))
    yield "softmax", ops.softmax(x.view(1, 1, 4096, cols))
    yield "embedding", ops.embedding(tokens, torch.randn(8, cols))


def check_sizes():
    for cols, asked in [(2112, True), (2048, True), (2047, False), (256, False)]:
        for name, y in outputs_of(cols):
            whole = -(-y.data_ptr() // LARGE) * LARGE  # the first large page that is its own
            assert ("hg" in flags_at(whole)) == asked, (name, cols)


def check_neighbours():
    y = ops.activation(torch.randn(4096, 2112 + 1), kind="silu")
    first, last = y.data_ptr(), y.data_ptr() + y.nbytes - 1
    for address in (first, last):
        if address // LARGE * LARGE < first or (address // LARGE + 1) * LARGE > last + 1:
            assert "hg" not in flags_at(address)


@pytest.mark.parametrize("check", ["check_sizes", "check_neighbours"])
def test_what_is_mapped_anew_asks_for_large_pages(check):
    """In a process of its own: where an earlier test has moved glibc's thresholds, large outputs
    lie in the heap, and small ones then come to lie in pages that were asked to be large."""
    code = f"import test_fresh_pages; test_fresh_pages.{check}()"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_an_op_without_memory_is_as_before():
    with torch.device("meta"):
        x = torch.empty(4096, 4096)
    assert ops.activation(x, kind="silu").is_meta
    with FakeTensorMode():
        assert ops.activation(torch.empty(4096, 4096), kind="silu").shape == (4096, 4096)
