"""Shapes, dtypes and devices: SMALL finds the edges, MODEL is real sizes (tests and benches)."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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


STOCK_ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}

# Rows that overflow, underflow or hold what is no number.
EXTREME = ("equal", "one huge", "tiny", "large", "huge", "infinity", "-infinity", "nan", "zero")


def extreme_rows(cols, dtype, device):
    """A row of each of EXTREME."""
    rows = randn(len(EXTREME), cols, dtype=torch.float32, device="cpu")
    x = dict(zip(EXTREME, rows, strict=True))
    x["equal"][:], x["one huge"][7], x["zero"][:] = 1.5, 1e18, 0.0
    x["tiny"] *= 1e-30
    x["large"] *= 1e18
    x["huge"] *= 1e30
    x["infinity"][3], x["-infinity"][3], x["nan"][9] = math.inf, -math.inf, math.nan
    return rows.to(device=device, dtype=dtype)


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
