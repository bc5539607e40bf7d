"""What the job runs on: the machine, the versions, the allocator setting, the ceilings."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from .measure import interleave

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_THRESHOLD = 1 << 30
TRIM_THRESHOLD = (1 << 31) - 1


def set_allocator() -> str:
    """Keeps freed pages in the process, for the whole job, and says so in one sentence.

    By default glibc maps and unmaps every large tensor, so that the kernel clears its pages anew;
    that cost is the allocator's, not the part's, and differs by size alone.
    """
    try:
        libc = ctypes.CDLL(None)
        kept = libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        kept &= libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    except (AttributeError, OSError):
        kept = 0
    if not kept:
        return "the C library's default (no mallopt here)"
    return "glibc malloc, mmap threshold 1 GiB, trim threshold 2 GiB: freed pages stay"


def describe_machine(device: torch.device, allocator: str) -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    described = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": memory,
        "last_cache_bytes": last_cache_bytes(torch.device("cpu")),
        "system": platform.platform(),
        "allocator": allocator,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "sm_count": gpu.multi_processor_count,
        }
    return described


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_cache_bytes(device: torch.device) -> int:
    """The size of the cache nearest to memory; 32 MiB where the machine does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


def describe_versions(command: str) -> dict:
    return {
        "redline": redline_version(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "command": command,
    }


def redline_version() -> str:
    import redline

    found = getattr(redline, "__version__", None)
    if found:
        return found
    source = Path(__file__).parents[3] / "VERSION"
    if source.exists():
        return source.read_text().strip()
    try:
        return importlib.metadata.version("redline-layers")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """The commit of the tree the package runs from, with + where files differ; None outside one."""
    tree = Path(__file__).parents[3]
    if not (tree / "VERSION").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Ceilings:
    """What this machine was measured to do at best: the redline."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    dtype: str

    def floor_us(self, nbytes: float, flops: float) -> float:
        """The least time for work that cannot avoid these bytes and operations."""
        return 1e6 * max(nbytes / self.copy_bytes_per_second, flops / self.matmul_flops_per_second)

    def raised_by(self, other: Ceilings) -> Ceilings:
        return Ceilings(
            max(self.copy_bytes_per_second, other.copy_bytes_per_second),
            max(self.matmul_flops_per_second, other.matmul_flops_per_second),
            self.dtype,
        )

    def as_dict(self) -> dict:
        return asdict(self)


def _large_copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy of far more than the last cache, and the bytes that it reads and writes."""
    least = 1 << 30 if device.type == "cuda" else 256 << 20
    source = torch.randn(max(4 * last_cache_bytes(device), least) // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


@cache
def measure_copy(device: torch.device) -> float:
    """Bytes per second of a large copy, the best run; measured once in a process."""
    call, nbytes = _large_copy(device)
    return nbytes / (min(interleave({"copy": call}, device, seconds=0.5).times["copy"]) * 1e-6)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copies far more than the last cache, and multiplies large matrices; the best run counts."""
    cuda = device.type == "cuda"
    copy, nbytes = _large_copy(device)
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = interleave(
        {"copy": copy, "matmul": lambda: torch.mm(a, b)},
        device,
        seconds=1.5,
    ).times
    return Ceilings(
        copy_bytes_per_second=nbytes / (min(times["copy"]) * 1e-6),
        matmul_flops_per_second=2 * side**3 / (min(times["matmul"]) * 1e-6),
        dtype=str(dtype).removeprefix("torch."),
    )
