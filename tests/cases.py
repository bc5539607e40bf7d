"""Shapes, dtypes and devices: SMALL finds the edges, MODEL is real sizes (tests and benches)."""

from pathlib import Path

import pytest
import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.cuda.is_available() and torch.ops.redline.has_cuda()),
            reason="needs a GPU and a build with CUDA",
        ),
    ),
]

# (rows, cols): 1, one under and over a vector, a block and a warp's share, odd, empty.
SMALL = [(1, 1), (3, 7), (2, 33), (5, 255), (4, 1024), (3, 1025), (2, 4097), (0, 64), (300, 8)]
MODEL = [(2048, 1024), (512, 4096), (64, 8192)]
HUGE = [(2, 20000), (1, 70001)]  # rows that outgrow a block's registers


def name(case):
    return "-".join(f"{axis}={size}" for axis, size in zip(("rows", "cols"), case, strict=False))


def randn(*shape, dtype, device, scale=1.0, shift=0.0, seed=0):
    """Normal data made on the CPU in float32 and rounded: the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    data = torch.randn(shape, generator=generator) * scale + shift
    return data.to(device=device, dtype=dtype)


def strided(tensor):
    """The same values with a gap behind each row and an unaligned first element."""
    gap = torch.empty(
        *tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device
    )
    gap[..., 1:-2] = tensor
    return gap[..., 1:-2]


def wide(*tensors):
    """float64 leaves with the same numbers, on the CPU."""
    return [
        None if tensor is None else tensor.detach().cpu().double().requires_grad_()
        for tensor in tensors
    ]


def built_program(name):
    """The program of build/make, which `make` keeps up to date, or of the newest other build."""
    root = Path(__file__).parents[1] / "build"
    found = sorted(
        [*root.glob(f"*/{name}"), *root.glob(name)], key=lambda path: path.stat().st_mtime
    )
    found += [path for path in [root / "make" / name] if path.exists()]
    if not found:
        pytest.skip("the C++ API is not built: tools/build.py --all")
    return found[-1]
