"""The table of kernels: what is read from cuobjdump's listings."""

import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tools"))

import kernel_table  # noqa: E402

LISTING = """
Fatbin elf code:
================
arch = sm_90a
identifier = /somewhere/redline/kernels/cuda/norm/forward.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7redline4cuda12_GLOBAL__N_114forward_kernelIfLi4EEEvT_:
  REG:40 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:728 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7redline4cuda12_GLOBAL__N_114forward_kernelI6__halfLi4EEEvT_:
  REG:64 STACK:32 SHARED:0 LOCAL:0 CONSTANT[0]:728 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5emptyv:
  REG:4 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:8 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
identifier = /somewhere/redline/kernels/cuda/norm/forward.cu
 Function _Z5emptyv:
  REG:9 STACK:0 SHARED:0 LOCAL:0
"""


def test_a_line_per_source_has_its_kernels_registers_and_spills():
    kernels = kernel_table.kernels_of(LISTING, "sm_90a")
    assert [kernel.registers for kernel in kernels] == [40, 64, 4]
    (line,) = kernel_table.table(kernels, {kernels[1].name: 28})[2:]
    assert line == (
        "| norm/forward.cu | 2 forward_kernel, 1 empty | 4 to 64 | 0 to 1280 | 1 | 28 to 28 |"
    )
    (other,) = kernel_table.kernels_of(LISTING, "sm_80")
    assert kernel_table.table([other], {})[-1].endswith("| 9 to 9 | 0 to 0 | 0 | – |")


def test_spilled_bytes_are_the_stores_to_the_stack():
    code = "STL [R1], R2 ;\n STL.64 [R1+0x8], R2 ;\n STL.128 [R1], R4 ;\n LDL R2, [R1] ;\n"
    assert kernel_table.spilled_bytes(code) == 4 + 8 + 16
    assert kernel_table.spilled_bytes("@P0 STL.U8 [R1], R2") == 1


def test_the_published_kernels_are_files_of_the_tree():
    lines = (root / "bench/results/kernels_sm_90a.md").read_text().splitlines()
    sources = [line.split("|")[1].strip() for line in lines if ".cu |" in line]
    assert len(sources) > 10
    assert all((root / "redline/kernels/cuda" / source).is_file() for source in sources)
