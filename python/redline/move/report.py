"""What `redline move` prints: a bar on stderr, the list or the differences on stdout."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import track

from redline.signpost import listing

if TYPE_CHECKING:
    from redline.move import Source

T = TypeVar("T")


def progress(things: list[T]) -> Iterable[T]:
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return track(things, "redline move", console=console, transient=True, disable=quiet)


def difference(source: Source) -> Iterator[str]:
    """The lines of a unified diff that `patch -p1` and `git apply` take."""
    before, after = (text.splitlines(keepends=True) for text in (source.before, source.after))
    name = source.path.as_posix().lstrip("/")
    for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"):
        yield line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"


def tell(found: list[Source], paths: list[Path], mode: str) -> None:
    moved = [source for source in found if source.moved and not source.left]
    if mode == "diff":
        for source in moved:
            sys.stdout.writelines(difference(source))
    else:
        _print(line for source in moved for line in listing(source.moved))
    notes = sys.stderr if mode == "diff" else sys.stdout
    for source in found:
        if source.left:
            print(f"{source.path}: left as it was: {source.left}", file=notes)
        elif source.by_hand:
            print("reached through another name, to be moved by hand:", file=notes)
            print("\n".join(listing(source.by_hand)), file=notes)
    if mode != "diff":
        print(_summary(moved, paths, mode))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _summary(moved: list[Source], paths: list[Path], mode: str) -> str:
    count = sum(len(source.moved) for source in moved)
    where = f"in {len(moved)} file{'s' if len(moved) != 1 else ''}"
    uses = f"{count} use{'s' if count != 1 else ''} of an old address {where}"
    if not count:
        return "nothing to move"
    if mode == "write":
        return f"moved {uses}"
    return f"{uses}; to move: redline move --write {shlex.join(map(str, paths))}"
