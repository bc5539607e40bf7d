"""`redline doctor`: what was found, what is missing, and the command that mends it.

Works where the library is not built, where torch is missing and where there is no GPU. Given a
program, it also lists the imports of the old address: Python hides their deprecation warnings.
"""

import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

oldest_cuda = (12, 8)
oldest_torch = (2, 11)
pip = f"{sys.executable} -m pip install"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. Without `needed`, Redline runs without it, with less."""

    name: str
    found: str = ""  # what is there, in words; empty where it is missing
    missing: str = ""  # what is wrong, in words; empty where all is well
    mend: str = ""  # the command that mends it
    needed: bool = True


def output_of(*command: str) -> str:
    """What a program prints, or nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else ""


def version_in(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def find_compiler() -> Finding:
    name = os.environ.get("CXX", "g++")
    first = output_of(name, "--version").partition("\n")[0]
    if not first:
        why = "no C++ compiler: neither `make build` nor torch.compile on the CPU works"
        return Finding("compiler", missing=why, mend="apt install g++", needed=False)
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        why = "no Python.h: torch.compile cannot compile for the CPU"
        return Finding("compiler", first, why, "apt install python3-dev", needed=False)
    return Finding("compiler", first)


def find_build_tools() -> Finding:
    names = ("cmake", "ninja")
    lacking = [
        name
        for name in names
        if shutil.which(name) is None and importlib.util.find_spec(name) is None
    ]
    if lacking:
        why = f"no {' and no '.join(lacking)}: needed to build, not to run"
        return Finding("build tools", "", why, f"{pip} {' '.join(lacking)}", needed=False)
    ccache = "ccache" if shutil.which("ccache") else "no ccache (apt install ccache)"
    return Finding("build tools", f"cmake, ninja, {ccache}")


def find_nvcc() -> str | None:
    """Where `make build` finds it: tools/check_spills.py."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")
    places = (None, "/usr/local/cuda/bin", *map(str, packaged))
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def find_toolkit() -> Finding:
    nvcc = find_nvcc()
    wanted = (
        "install CUDA 12.8 or newer and put nvcc on PATH, or pip install nvidia-cuda-nvcc and "
        "nvidia-cuda-cccl of torch's CUDA version, then: make build"
    )
    if nvcc is None:
        why = "no nvcc: the CUDA kernels are not compiled"
        return Finding("CUDA toolkit", missing=why, mend=wanted, needed=False)
    release = version_in(output_of(nvcc, "--version").partition("release")[2])
    found = f"{nvcc}, release {'.'.join(map(str, release))}"
    if release[:2] < oldest_cuda:
        return Finding("CUDA toolkit", found, "older than 12.8", wanted, needed=False)
    return Finding("CUDA toolkit", found)


def find_driver() -> Finding:
    query = "--query-gpu=driver_version,name"
    lines = output_of("nvidia-smi", query, "--format=csv,noheader").splitlines()
    if lines:
        version, _, name = lines[0].partition(", ")
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        return Finding("driver", f"{version} ({name}{more})")
    why = "no NVIDIA driver: everything runs on the CPU"
    mend = "none where there is no NVIDIA GPU; otherwise: apt install nvidia-driver"
    return Finding("driver", missing=why, mend=mend, needed=False)


def find_torch() -> Finding:
    mend = f"{pip} 'torch==2.11.*'"
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways
        return Finding("torch", missing=f"does not import: {error}", mend=mend)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    if version_in(torch.__version__)[:2] < oldest_torch:
        return Finding("torch", found, "older than 2.11", mend)
    return Finding("torch", found)


def find_capability() -> Finding:
    name = "capability"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        why = "torch sees no GPU"
        mend = "the lines on driver and torch say how"
        return Finding(name, missing=why, mend=mend, needed=False)
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)}: sm_{major}{minor}")
    if torch.cuda.get_device_capability(0) < (8, 0):
        return Finding(name, "; ".join(found), "older than sm_80: no kernel for it", needed=False)
    return Finding(name, "; ".join(found))


def find_library() -> Finding:
    try:
        library = importlib.import_module("redline._library")
    except Exception as error:  # the loader's own words are the finding
        return Finding("library", missing=str(error), mend="make build")
    torch = sys.modules["torch"]
    has_cuda = torch.ops.redline.has_cuda()
    found = f"{library.__version__} ({'CPU and CUDA' if has_cuda else 'CPU'}), {library.PATH}"
    if torch.cuda.is_available() and not has_cuda:
        why = "there is a GPU, and the library was built without CUDA"
        return Finding("library", found, why, "put nvcc on PATH, then: make build", needed=False)
    return Finding("library", found)


def find_instruction_set() -> Finding:
    name = "instruction set"
    if not find_library().found:
        return Finding(name, missing="unknown without the library", mend="make build", needed=False)
    chosen = sys.modules["torch"].ops.redline.instruction_set()
    return Finding(name, f"{chosen} on {platform.machine()}")


searches: tuple[Callable[[], Finding], ...] = (
    find_compiler,
    find_build_tools,
    find_toolkit,
    find_driver,
    find_torch,
    find_capability,
    find_library,
    find_instruction_set,
)


def doctor() -> list[Finding]:
    """Everything that was looked for, in the order in which it is told."""
    python = Finding("Python", f"{platform.python_version()}, {sys.executable}")
    return [python, *(search() for search in searches)]


def run(path: Path | None = None) -> int:
    """Prints the findings, and for a file or folder its imports of the old address.

    Returns 1 where something is missing that nothing works without, or where `path` does not
    exist, and 0 otherwise.
    """
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    findings = doctor()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        sign = sign_of(finding)
        told = [part for part in (finding.found, finding.missing) if part]
        console.print(f"{sign} {finding.name:<{width}}  ", end="")
        console.print("; ".join(told), markup=False)
        if finding.missing and finding.mend:
            console.print(f"  {'':<{width}}  [dim]to mend:[/dim] ", end="")
            console.print(finding.mend, markup=False)
    status = int(any(finding.missing and finding.needed for finding in findings))
    if path is not None:
        status |= tell_old_imports(path, console)
    return status


def tell_old_imports(path: Path, console) -> int:
    """Prints what sources under `path` take from an old address; 1 where there is no such path."""
    from redline import move, signpost

    if not path.exists():
        console.print(f"redline: {path}: no such file or folder", markup=False)
        return 1
    found, unread = move.find(path)
    lines = ["", *unread]
    if found:
        plural = "s" if len(found) > 1 else ""
        lines.append(f"{path}: {len(found)} import{plural} of the old address:")
        lines += signpost.listing(found)
        lines.append(f"to rewrite them: redline move --write {shlex.quote(str(path))}")
    else:
        lines.append(f"{path}: no import of the old address")
    console.print("\n".join(lines), markup=False)
    return 0


def sign_of(finding: Finding) -> str:
    if not finding.missing:
        return "[green]✓[/green]"
    return "[red]✗[/red]" if finding.needed else "[yellow]–[/yellow]"
