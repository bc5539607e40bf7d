"""Finds where a program imports Megatron's custom layers from the address that they left.

Python hides deprecation warnings by default, and programs for C++ have none: `redline doctor PATH`
reads the sources instead. Nothing is imported or run.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

old_packages = (
    "redline.transformer.custom_layers",
    "megatron.core.transformer.custom_layers",
)
replacement = "redline.extensions.transformer_engine"
cpp_suffixes = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}
cpp_include = re.compile(r'^\s*#\s*include\s*[<"](redline/transformer/custom_layers/[^>"]+)')
cpp_replacement = "redline/extensions/transformer_engine.h"
passed_over = {".git", ".venv", "venv", "build", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class OldImport:
    path: Path
    line: int
    address: str  # what is imported
    replacement: str  # what to import instead


def is_old(address: str) -> bool:
    return any(address == package or address.startswith(package + ".") for package in old_packages)


def addresses_of(node: ast.AST) -> list[str]:
    """The modules that a statement or a call of import_module names."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        if is_old(node.module):
            return [node.module]
        return [f"{node.module}.{name.name}" for name in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def in_python(path: Path) -> Iterator[OldImport]:
    """Raises SyntaxError or UnicodeDecodeError for a file that is not Python."""
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        for address in filter(is_old, addresses_of(node)):
            yield OldImport(path, node.lineno, address, replacement)


def in_cpp(path: Path) -> Iterator[OldImport]:
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if found := cpp_include.match(line):
            yield OldImport(path, number, found[1], cpp_replacement)


def sources(path: Path) -> Iterator[Path]:
    """The file itself, or every Python and C++ file under a folder, hidden ones left out."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = passed_over & set(file.relative_to(path).parts[:-1])
        if not hidden and file.suffix in {".py", *cpp_suffixes} and file.is_file():
            yield file


def old_imports(path: Path) -> tuple[list[OldImport], list[str]]:
    """The imports of the old address, in order, and a sentence per file that cannot be read."""
    found: list[OldImport] = []
    unread: list[str] = []
    for file in sources(path):
        search = in_cpp if file.suffix in cpp_suffixes else in_python
        try:
            found += sorted(search(file), key=lambda old: old.line)
        except (SyntaxError, ValueError, RecursionError, OSError) as error:
            unread.append(f"{file}: not read: {error}")
    return found, unread


def tell(path: Path, console) -> int:
    """Prints what was found under `path`; returns 1 where there is no such path."""
    if not path.exists():
        console.print(f"redline: {path}: no such file or folder", markup=False)
        return 1
    found, unread = old_imports(path)
    console.print()
    for sentence in unread:
        console.print(sentence, markup=False)
    if not found:
        console.print(f"{path}: no import of the old address", markup=False)
        return 0
    plural = "s" if len(found) > 1 else ""
    console.print(f"{path}: {len(found)} import{plural} of the old address:", markup=False)
    for old in found:
        console.print(f"  {old.path}:{old.line}: {old.address}", markup=False)
        console.print(f"      import instead: {old.replacement}", markup=False)
    return 0
