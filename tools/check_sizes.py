#!/usr/bin/env python3
"""Fails where a file, function, parameter list, nest or line is over its budget.

Over a budget only with the reason in the first 20 lines of the file:

    // Over budget: parameters: the dispatcher's schema fixes the signature.

The kinds: lines, function, parameters, template parameters, nesting, columns. C++ is read by
tools/cpp_functions.py, Python by its own parser. In Python a docstring is not counted as part of
a function, and of the parameters the positional ones, without self: a keyword-only one is named
at the call. The parameters of an op's own functions are not counted: the dispatcher's schema
fixes them, in C++ and in Python alike.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cpp_functions import functions_of, template_lists_of

file_lines = 400
function_lines = {"host": 50, "device": 80, "global": 120}
parameters = 5
template_parameters = 4
nesting = 3
columns = 100
head_lines = 20

cpp_suffixes = {".h", ".cuh", ".cpp", ".cu"}
schema_folders = ("redline/ops/", "python/redline/ops/")
folders = ("redline", "python", "tests", "tools", "bench", "examples", "cmake")


@dataclass
class Fault:
    line: int
    kind: str
    text: str


def excused(text: str) -> set[str]:
    """The kinds of budget that the head of a file gives a reason for."""
    head = "\n".join(text.splitlines()[:head_lines])
    return {match[1].strip() for match in re.finditer(r"Over budget: ([a-z ]+): \S", head)}


def faults_of_lines(text: str) -> list[Fault]:
    lines = text.splitlines()
    faults = [
        Fault(number, "columns", f"{len(line)} columns, at most {columns}")
        for number, line in enumerate(lines, 1)
        if len(line) > columns and "http" not in line
    ]
    if len(lines) > file_lines:
        faults.append(Fault(file_lines + 1, "lines", f"{len(lines)} lines, at most {file_lines}"))
    return faults


def faults_of_function(line: int, name: str, sizes: dict[str, tuple[int, int]]) -> list[Fault]:
    """`sizes` holds, by kind, what was counted and the budget."""
    units = {"function": "lines", "nesting": "levels of nesting"}
    return [
        Fault(line, kind, f"{name}: {count} {units.get(kind, kind)}, at most {budget}")
        for kind, (count, budget) in sizes.items()
        if count > budget
    ]


def faults_of_cpp(text: str) -> list[Fault]:
    faults = []
    for function in functions_of(text):
        sizes = {
            "function": (function.lines, function_lines[function.place]),
            "parameters": (function.parameters, parameters),
            "nesting": (function.nesting, nesting),
        }
        faults += faults_of_function(function.line, function.name, sizes)
    for line, count in template_lists_of(text):
        if count > template_parameters:
            what = f"{count} template parameters, at most {template_parameters}"
            faults.append(Fault(line, "template parameters", what))
    return faults


nests = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.Match)
closures = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def depth(statement: ast.AST) -> int:
    """How deep control statements lie within each other; an elif is as deep as its if."""
    inner = 0
    for field, value in ast.iter_fields(statement):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, closures):
                continue
            is_elif = isinstance(statement, ast.If) and field == "orelse" and len(value) == 1
            same = is_elif and isinstance(child, ast.If)
            inner = max(inner, depth(child) - same)
    return inner + isinstance(statement, nests)


def python_parameters(function: ast.FunctionDef) -> int:
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def python_lines(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def faults_of_python(text: str) -> list[Fault]:
    faults = []
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            sizes = {
                "function": (python_lines(function), function_lines["host"]),
                "parameters": (python_parameters(function), parameters),
                "nesting": (depth(function), nesting),
            }
            faults += faults_of_function(function.lineno, function.name, sizes)
    return faults


def check_file(path: Path) -> list[str]:
    text = path.read_text()
    faults = faults_of_lines(text)
    if path.suffix == ".py":
        faults += faults_of_python(text)
    elif path.suffix in cpp_suffixes:
        faults += faults_of_cpp(text)
    reasons = excused(text)
    if path.as_posix().startswith(schema_folders):
        reasons.add("parameters")
    return [f"{path}:{fault.line}: {fault.text}" for fault in faults if fault.kind not in reasons]


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    suffixes = cpp_suffixes | {".py", ".cmake"}
    return [Path(name) for name in names if Path(name).suffix in suffixes and Path(name).exists()]


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or tracked_files()
    found = [fault for path in files for fault in check_file(path)]
    print("\n".join(found) or f"sizes: {len(files)} files within budget")
    sys.exit(bool(found))
