#!/usr/bin/env python3
"""Compiles the CUDA kernels for an architecture; fails where one does not compile, or spills.

    check_spills.py --arch sm_90a                 every .cu under redline/kernels/cuda
    check_spills.py --arch sm_80 FILE.cu ...      these

Every file must compile: one that names REDLINE_ELEMENT, once for each element type. A spill is a
failure in the files given by name and in the listed ones of the architecture; elsewhere it is
printed.

For an architecture before sm_90 Hopper's own kernels (sm90 in the path) are left out.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

read_for_registers = {
    "cross_entropy/promised.cu",
    "embedding/backward.cu",
    "embedding/forward.cu",
    "norm/amax_forward.cu",
    "norm/backward.cu",
    "norm/dropout_backward.cu",
    "norm/few_rows.cu",
    "norm/forward.cu",
    "rotary.cu",
}
listed = {  # by architecture: files that must stay free of spills
    "sm_90a": read_for_registers,
    "sm_80": read_for_registers,
}
element_types = ("float", "bfloat16", "float16")  # cmake/kernels.cmake
kernels = Path("redline/kernels/cuda")
flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin", "-I."]


def find_nvcc() -> str | None:
    """nvcc from PATH, from where the toolkit installs itself, or of the interpreter's packages."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")
    places = (None, "/usr/local/cuda/bin", *map(str, packaged))
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def spills(log: str) -> list[str]:
    """The kernels that spill, from what `ptxas -v` printed."""
    faults = []
    kernel = "a kernel"
    for line in log.splitlines():
        if found := re.search(
            r"(?:Compiling entry function|Function properties for) '?([\w$]+)'?", line
        ):
            kernel = found[1]
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if found and (int(found[1]) or int(found[2])):
            faults.append(f"{kernel}: {found[1]} bytes spilled, {found[2]} bytes read back")
    return faults


def is_for(path: Path, arch: str) -> bool:
    """Whether a kernel file is meant for an architecture."""
    hopper_only = "sm90" in str(path)
    return not hopper_only or int(re.sub(r"\D", "", arch)) >= 90


def parts_of(path: Path) -> list[list[str]]:
    """The options that a file is compiled with, once for each."""
    if "REDLINE_ELEMENT" not in path.read_text():
        return [[]]
    return [[f"-DREDLINE_ELEMENT={element}"] for element in element_types]


def compile_one(nvcc: str, path: Path, arch: str, part: Sequence[str] = ()) -> list[str]:
    command = [nvcc, *flags, *part, f"-arch={arch}", "-o", os.devnull, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    if result.returncode != 0:
        return [f"{' '.join([str(path), *part])}: does not compile for {arch}:\n{log}"]
    return [f"{path}: {arch}: {demangled(fault)}" for fault in spills(log)]


def demangled(text: str) -> str:
    """C++ names as they were written, where binutils is there to say so."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="sm_90a, sm_80, ...")
    parser.add_argument("--find", action="store_true", help="print where nvcc is; 1 without one")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    nvcc = find_nvcc()
    if options.find:
        print(nvcc or "")
        sys.exit(nvcc is None)
    if nvcc is None:
        sys.exit("spills: there is no nvcc")
    files = options.files or sorted(kernels.rglob("*.cu"))
    files = [path for path in files if is_for(path, options.arch)]
    parts = [(path, part) for path in files for part in parts_of(path)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda part: compile_one(nvcc, part[0], options.arch, part[1]), parts)
    found = [
        (path, fault) for (path, _), result in zip(parts, results, strict=True) for fault in result
    ]
    print("\n".join(fault for _, fault in found) or f"spills: none in {len(files)} files")
    strict = listed.get(options.arch, set())
    sys.exit(
        any(
            options.files
            or path.relative_to(kernels).as_posix() in strict
            or "not compile" in fault
            for path, fault in found
        )
    )


if __name__ == "__main__":
    main()
