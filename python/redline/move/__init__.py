"""`redline move`: rewrites imports of an old address to the new one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from redline.move import cpp, files, search
from redline.signpost import OldImport


class MoveError(Exception):
    """A request that cannot be carried out, in one sentence."""


@dataclass
class Source:
    """A file that names an old address, before and after."""

    path: Path
    before: str = ""
    after: str = ""
    moved: list[OldImport] = field(default_factory=list)
    by_hand: list[OldImport] = field(default_factory=list)
    left: str = ""  # why the file is left as it was, in words


def rewrite(path: Path) -> Source | None:
    """What moving makes of a file, or None where it names no old address. Writes nothing."""
    try:
        before = files.read(path)
        found = search.uses(path, before) if before else []
        if not found:
            return None
        after = _moved(path, before)
        remaining = [(use.address, use.replacement) for use in search.uses(path, after)]
    except (search.Unreadable, OSError) as error:
        return Source(path, left=_why(error))
    source = Source(path, before, after)
    for use in found:
        if (use.address, use.replacement) in remaining:
            remaining.remove((use.address, use.replacement))
            source.by_hand.append(use)
        else:
            source.moved.append(use)
    return source


def find(path: Path) -> tuple[list[OldImport], list[str]]:
    """What sources take from an old address, in order, and a sentence per file not read."""
    found: list[OldImport] = []
    unread: list[str] = []
    try:
        for source in files.sources(path):
            try:
                text = files.read(source)
                found += search.uses(source, text) if text else []
            except (search.Unreadable, OSError) as error:
                unread.append(f"{source}: not read: {_why(error)}")
    except OSError as error:
        unread.append(f"{error.filename}: not read: {_why(error)}")
    return found, unread


def run(paths: list[Path], mode: str) -> int:
    """Lists (`list`, `check`), shows (`diff`) or writes (`write`) what moves under `paths`.

    Returns 0, or 1 where a file was left as it was or something is to be moved by hand, and with
    `check` wherever an old address is named. Raises MoveError.
    """
    from redline.move import report

    for path in paths:
        if not path.exists():
            raise MoveError(f"{path}: no such file or folder")
    if importlib.util.find_spec("libcst") is None:
        pip = f"{sys.executable} -m pip install libcst"
        raise MoveError(f"libcst is missing, which reads and writes Python; install it with: {pip}")
    try:
        sources = _unique(paths)
    except OSError as error:
        raise MoveError(f"{error.filename}: {_why(error)}") from None
    found = [source for source in map(rewrite, report.progress(sources)) if source]
    if mode == "write":
        for source in report.progress([source for source in found if source.moved]):
            _write(source)
    report.tell(found, paths, mode)
    incomplete = any(source.left or source.by_hand for source in found)
    return int(incomplete or (mode == "check" and bool(found)))


def _moved(path: Path, text: str) -> str:
    if path.suffix in cpp.suffixes:
        return cpp.moved(text, search.staying_lines(text))
    from redline.move import python

    mark = "\ufeff" if text.startswith("\ufeff") else ""
    return mark + python.moved(text.removeprefix(mark), search.package_of(path))


def _unique(paths: list[Path]) -> list[Path]:
    """Every source under the paths once, though paths may overlap and links may lead to it."""
    sources: Iterator[Path] = (source for path in paths for source in files.sources(path))
    return list({source.resolve(): source for source in sources}.values())


def _write(source: Source) -> None:
    try:
        files.write(source.path, source.after)
    except OSError as error:
        source.left = _why(error)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
