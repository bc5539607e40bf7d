"""Which files are looked at, and how one is read and written."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from redline.move import cpp
from redline.move.search import Unreadable

passed_over = {".git", ".venv", "venv", "build", "node_modules", "__pycache__"}
suffixes = {".py", ".pyi", *cpp.suffixes}
mark = "custom_layers"  # a source without it takes nothing from an old address
_marks = tuple(mark.encode(coding) for coding in ("utf-8", "utf-16-le", "utf-16-be"))


def sources(path: Path) -> Iterator[Path]:
    """The file itself, or every Python and C++ file under a folder, in order.

    Hidden environments and builds are left out, and so are links: a link's file is looked at
    where it lies, if it lies under the folder. Raises OSError for a folder that cannot be read.
    """
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(set(folders) - passed_over)
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix in suffixes and stat.S_ISREG(file.lstat().st_mode):
                yield file


def _raise(error: OSError) -> None:
    raise error


def read(path: Path) -> str | None:
    """The text of a source, or None where it has no mark. Raises Unreadable or OSError."""
    content = path.read_bytes()
    if not any(mark in content for mark in _marks):
        return None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 (byte {error.start})") from None


def write(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that it is whole at any moment; a link stays a link.

    Raises PermissionError for a file that nobody may write, though a rename would replace it.
    """
    path = path.resolve()
    if not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("it is read-only")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as aside:
            aside.write(text.encode())
            aside.flush()
            os.fsync(aside.fileno())
        shutil.copymode(path, name)
        owner = path.stat()
        if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(name, owner.st_uid, owner.st_gid)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
