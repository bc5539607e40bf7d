#!/usr/bin/env python3
"""Prints a Markdown table of the CUDA kernels in the built library: a line per source file, with
what they take of a multiprocessor and what they spill.

    kernel_table.py                       of python/redline/lib/libredline_ops.so, for sm_90a
    kernel_table.py --arch sm_80 FILE     of another library or object file

Registers and static shared memory are cuobjdump's; what is spilled are the bytes that a kernel's
code stores to its stack, each place in the code counted once, as ptxas does.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

root = Path(__file__).resolve().parent.parent
library = root / "python" / "redline" / "lib" / "libredline_ops.so"
widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of a store; 4 otherwise
head = [
    "| source | kernels | registers | static shared bytes | kernels that spill | bytes spilled |",
    "|---|---|---|---|---|---|",
]


@dataclass
class Kernel:
    source: str
    name: str  # mangled
    registers: int
    stack: int
    shared: int

    def family(self) -> str:
        """The function's own name: the last of a mangled name's parts before its arguments."""
        rest, name = re.sub(r"^_ZN?K?", "", self.name), self.name
        while found := re.match(r"(\d+)", rest):
            size = int(found[1])
            rest = rest[found.end() :]
            name, rest = rest[:size], rest[size:]
        return name


def find_cuobjdump() -> str | None:
    """From PATH, from where the toolkit installs itself, or of the interpreter's packages."""
    packages = Path(sysconfig.get_path("purelib"))
    places = [*packages.glob("nvidia/cu*/bin"), packages / "triton" / "backends" / "nvidia" / "bin"]
    every = (None, "/usr/local/cuda/bin", *map(str, places))
    return next(filter(None, (shutil.which("cuobjdump", path=place) for place in every)), None)


def kernels_of(listing: str, arch: str) -> list[Kernel]:
    """The kernels of an architecture, from what `cuobjdump -res-usage` printed."""
    found, source, name, wanted = [], "", "", False
    for line in listing.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            wanted = match[1] == arch
        elif match := re.match(r"identifier = (.*)", line):
            source = match[1].rpartition("redline/kernels/cuda/")[2]
        elif match := re.match(r"\s*Function ([\w$]+):", line):
            name = match[1]
        elif wanted and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            found.append(Kernel(source, name, *map(int, match.groups())))
    return found


def spilled_bytes(code: str) -> int:
    """What the code of a kernel stores to its stack."""
    stores = re.findall(r"\bSTL((?:\.\w+)*)", code)
    return sum(
        next((widths[part] for part in store.split(".") if part in widths), 4) for store in stores
    )


def line_of(source: str, kernels: list[Kernel], spilled: dict[str, int]) -> str:
    names = [kernel.family() for kernel in kernels]
    families = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    registers = [kernel.registers for kernel in kernels]
    shared = [kernel.shared for kernel in kernels]
    bytes_of = [spilled[kernel.name] for kernel in kernels if spilled.get(kernel.name)]
    cells = (
        source,
        families,
        f"{min(registers)} to {max(registers)}",
        f"{min(shared)} to {max(shared)}",
        str(len(bytes_of)),
        f"{min(bytes_of)} to {max(bytes_of)}" if bytes_of else "–",
    )
    return f"| {' | '.join(cells)} |"


def table(kernels: list[Kernel], spilled: dict[str, int]) -> list[str]:
    sources: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        sources.setdefault(kernel.source, []).append(kernel)
    return [*head, *(line_of(source, sources[source], spilled) for source in sorted(sources))]


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="sm_90a, sm_80, ...")
    parser.add_argument("file", nargs="?", type=Path, default=library)
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("kernels: there is no cuobjdump")
    if not options.file.is_file():
        sys.exit(f"kernels: there is no {options.file}")
    kernels = kernels_of(printed(cuobjdump, "-res-usage", str(options.file)), options.arch)
    if not kernels:
        sys.exit(f"kernels: {options.file} has none for {options.arch}")
    spilled = {
        kernel.name: spilled_bytes(printed(cuobjdump, "-sass", "-fun", kernel.name, options.file))
        for kernel in kernels
        if kernel.stack
    }
    commit = printed("git", "-C", str(root), "log", "-1", "--format=%h", "--", "redline/kernels")
    print(f"# Kernels for {options.arch}\n")
    print(
        f"`python tools/kernel_table.py --arch {options.arch}`, of the kernels at "
        f"{commit.strip()}: {len(kernels)} in {len({k.source for k in kernels})} files.\n"
    )
    print("\n".join(table(kernels, spilled)))


if __name__ == "__main__":
    main()
