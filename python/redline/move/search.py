"""Finds what a source takes from an old address. Nothing is imported or run.

`redline doctor PATH` lists it, and `redline move` rewrites it: the search before and after says
what was moved and what is left. It needs the standard library alone.
"""

import ast
import importlib.util
import re
import sys
import warnings
from pathlib import Path

from redline.move import cpp
from redline.signpost import OldImport, new_address

# Nothing is left behind in Redline's old package. Megatron's holds other modules, which stay.
table = {"redline.transformer.custom_layers": "redline.extensions", **new_address}
_longest_first = sorted(map(re.escape, table), key=len, reverse=True)
in_string = re.compile(rf"(?<![\w.])({'|'.join(_longest_first)})(?!\w)")
stay = "redline move: stay"  # in a comment: what its line names is meant


class Unreadable(ValueError):
    """Why a source cannot be read, in words."""


def renamed(dotted: str) -> str | None:
    """The new name of what a dotted name reaches through an old address."""
    for old, new in table.items():
        if dotted == old or dotted.startswith(old + "."):
            return new + dotted[len(old) :]
    return None


def renamed_string(value: str) -> str | None:
    """The new content of a string that is a path to a module; prose, which has blanks, is none."""
    if not in_string.search(value) or re.search(r"\s", value):
        return None
    return in_string.sub(lambda found: table[found[1]], value)


def staying_lines(text: str) -> set[int]:
    if stay not in text:
        return set()
    return {number for number, line in enumerate(text.split("\n"), 1) if stay in line}


def package_of(path: Path) -> str:
    """The package of a module in a checkout of Megatron or Redline: what `from . import` means."""
    parts = path.absolute().parent.parts
    for root in ("megatron", "redline"):
        if root in parts:
            return ".".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    return ""


def parse(text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a source's own warnings are not ours to print
            return ast.parse(text.removeprefix("\ufeff"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise Unreadable(f"Python {version} cannot parse it: {error}") from None


def absolute(module: str, level: int, package: str) -> str:
    """The module that a `from` names, its leading dots resolved; empty where they lead nowhere."""
    if level == 0:
        return module
    try:
        return importlib.util.resolve_name("." * level + module, package)
    except ImportError:
        return ""


def bound_names(tree: ast.Module, package: str = "") -> dict[str, str]:
    """What the imports of a source bind, at any depth, to which modules and names."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node.module or "", node.level, package)
            bound |= {name.asname or name.name: f"{module}.{name.name}" for name in node.names}
    return bound


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of an expression that is nothing else, or empty."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


class _Search(ast.NodeVisitor):
    def __init__(self, package: str, bound: dict[str, str], staying: set[int]):
        self.package = package
        self.bound = bound
        self.staying = staying
        self.found: list[tuple[int, str]] = []

    def add(self, node: ast.AST, address: str) -> None:
        if self.staying.isdisjoint(range(node.lineno, node.end_lineno + 1)):
            self.found.append((node.lineno, address))

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if renamed(name.name):
                self.add(node, name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = absolute(node.module or "", node.level, self.package)
        named = [module] if renamed(module) else [f"{module}.{name.name}" for name in node.names]
        for address in filter(renamed, named):
            self.add(node, address)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root, _, rest = dotted_name(node).partition(".")
        reached = self.bound.get(root, root)
        # A name that is bound to the old address itself moves with its import.
        if rest and not renamed(reached) and renamed(f"{reached}.{rest}"):
            self.add(node, f"{reached}.{rest}")
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and renamed_string(node.value):
            self.add(node, node.value)


def in_python(text: str, package: str = "") -> list[tuple[int, str, str]]:
    """Line, old and new of each use of an old address. Raises Unreadable."""
    tree = parse(text)
    search = _Search(package, bound_names(tree, package), staying_lines(text))
    try:
        search.visit(tree)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    return sorted(
        (line, old, renamed(old) or renamed_string(old) or "") for line, old in search.found
    )


def in_cpp(text: str) -> list[tuple[int, str, str]]:
    """As in_python, of C++."""
    staying = staying_lines(text)
    try:
        edits = list(cpp.edits(text))
    except ValueError as error:
        raise Unreadable(str(error)) from None
    lines = [text.count("\n", 0, edit.start) + 1 for edit in edits]
    return [(at, e.old, e.new) for at, e in zip(lines, edits) if at not in staying]


def uses(path: Path, text: str) -> list[OldImport]:
    """What the source at `path` takes from an old address, by line. Raises Unreadable."""
    is_cpp = path.suffix in cpp.suffixes
    found = in_cpp(text) if is_cpp else in_python(text, package_of(path))
    return [OldImport(path, *use) for use in found]
