"""One library in a process, whichever copy of the package asks for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import redline._library

ROOT = Path(__file__).parents[1]

LOAD_BOTH = """
import sys
sys.path.insert(0, {first!r})
import redline._library
for name in [name for name in sys.modules if name.startswith("redline")]:
    del sys.modules[name]
sys.path[0] = {second!r}
import redline._library
import redline
print(redline.__file__)
"""


@pytest.fixture
def copies(tmp_path):
    """Two folders with the package in them."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        package = folder / "redline"
        (package / "lib").mkdir(parents=True)
        for name in ("__init__.py", "_library.py"):
            shutil.copy(ROOT / "python" / "redline" / name, package)
        shutil.copy(redline._library.PATH, package / "lib")
    return folders


def load_both(copies):
    program = LOAD_BOTH.format(first=str(copies[0]), second=str(copies[1]))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_same_build_is_loaded_once(copies):
    ran = load_both(copies)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(copies[1] / "redline" / "__init__.py")


def test_two_builds_are_refused(copies):
    first, second = (folder / "redline" / "lib" / redline._library.PATH.name for folder in copies)
    with second.open("ab") as file:
        file.write(b"another build")
    ran = load_both(copies)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        f"ImportError: redline: two copies are in this process: {first} "
        f"({redline._library.__version__}) is loaded, and {second} is another build: "
        "keep one of them"
    )
