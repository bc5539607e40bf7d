"""What `redline move` does with files, and what it says."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from redline import cli, move
from redline.move import cpp, files, report
from test_move import C_OLD, M_NEW, M_OLD, plant

pytest.importorskip("redline.move.python", reason="needs libcst: pip install libcst")


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["redline", "move", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


# --- files ----------------------------------------------------------------------------------------

LINE = f"import {M_OLD}.transformer_engine"
MOVED = f"import {M_NEW}.transformer_engine"
INCLUDE = f'#include "{cpp.old_folder}transformer_engine.h"'


@pytest.mark.parametrize(
    "frame",
    [
        b"%s",
        b"%s\n",
        b"\r\n%s\r\n",
        b"\xef\xbb\xbf%s\r\n",
        b"\x0c\n%s\n\t \n",
        b"x = 1\r\n%s\ny = 2",
    ],
)
def test_every_other_byte_stays(tmp_path, monkeypatch, frame):
    path = plant(tmp_path, "a.py", frame % LINE.encode())
    assert run(monkeypatch, "--write", path) == 0
    assert path.read_bytes() == frame % MOVED.encode()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.py", f"# \xe9\n{LINE}\n".encode("latin-1"), "it is not UTF-8 (byte 2)"),
        ("a.py", f"{LINE}\n".encode("utf-16"), "it is not UTF-8 (byte 0)"),
        ("a.h", f"// \xe9 {C_OLD}".encode("latin-1"), "it is not UTF-8 (byte 3)"),
        ("a.py", f"{LINE}\ndef f(:\n".encode(), "Python {} cannot parse it: invalid syntax"),
        ("a.py", f"{LINE}\n\0".encode(), "Python {} cannot parse it: source code"),
        ("a.py", f"{LINE}\ny = 1\r".encode(), "libcst reads it in another way than it is written"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_and_left(tmp_path, capsys, name, content, why):
    path = plant(tmp_path, name, content)
    other = plant(tmp_path, "other.py", LINE)
    assert move.run([tmp_path], "write") == 1
    version = ".".join(map(str, sys.version_info[:2]))
    assert f"{path}: left as it was: {why.format(version)}" in capsys.readouterr().out
    assert path.read_bytes() == content
    assert other.read_text() == MOVED


def test_a_read_only_file_is_told_and_left(tmp_path, monkeypatch, capsys):
    path = plant(tmp_path, "a.py", LINE)
    path.chmod(0o444)
    assert run(monkeypatch, "--write", path) == 1
    assert f"{path}: left as it was: it is read-only\n" in capsys.readouterr().out
    assert path.read_text() == LINE
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_leads_to_the_moved_file(tmp_path, monkeypatch, capsys):
    path = plant(tmp_path, "src/a.py", LINE)
    link = tmp_path / "link.py"
    link.symlink_to("src/a.py")
    assert run(monkeypatch, "--write", link, path, tmp_path) == 0
    assert link.is_symlink() and link.read_text() == MOVED
    assert "moved 1 use of an old address in 1 file\n" in capsys.readouterr().out


def test_what_a_link_leads_to_outside_is_not_touched(tmp_path, monkeypatch):
    outside = plant(tmp_path, "outside/a.py", LINE)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").symlink_to(outside)
    (tmp_path / "src/folder").symlink_to(outside.parent)
    (tmp_path / "src/circle").symlink_to(tmp_path / "src")
    assert run(monkeypatch, "--write", tmp_path / "src") == 0
    assert outside.read_text() == LINE


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, capsys):
    path = plant(tmp_path, "src/a.py", LINE)
    closed = plant(tmp_path, "src/closed/a.py", LINE).parent
    scan = os.scandir

    def refuse(folder):
        if str(folder) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert run(monkeypatch, "--write", tmp_path) == 1
    assert capsys.readouterr().err == f"redline move: {closed}: Permission denied\n"
    assert path.read_text() == LINE
    assert move.find(tmp_path)[1] == [f"{closed}: not read: Permission denied"]


def test_mode_stays_and_nothing_lies_beside(tmp_path, monkeypatch):
    path = plant(tmp_path, "a.py", LINE)
    path.chmod(0o750)
    assert run(monkeypatch, "--write", path) == 0
    assert path.stat().st_mode & 0o777 == 0o750
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_file_whole(tmp_path, monkeypatch):
    path = plant(tmp_path, "a.py", LINE)

    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, MOVED)
    assert path.read_text() == LINE
    assert list(tmp_path.iterdir()) == [path]


def test_a_large_tree_is_searched_under_a_bar(tmp_path, monkeypatch, capsys):
    for folder in range(100):
        (tmp_path / f"{folder}").mkdir()
        for name in range(100):
            (tmp_path / f"{folder}/{name}.py").write_text("import os\n")
    old = [plant(tmp_path, f"{folder}/old.py", LINE) for folder in range(10)]
    plant(tmp_path, ".venv/a.py", LINE)
    monkeypatch.setattr(report.Console, "is_terminal", True)
    assert run(monkeypatch, "--write", tmp_path) == 0
    assert all(path.read_text() == MOVED for path in old)
    told = capsys.readouterr()
    assert "redline move" in told.err and "100%" in told.err
    assert told.out.endswith("moved 10 uses of an old address in 10 files\n")
    assert (tmp_path / ".venv/a.py").read_text() == LINE


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plant(tmp_path, "src/a.py", f"x = 1\n{LINE}")
    plant(tmp_path, "src/b.cpp", f"#include <vector>\r\n{INCLUDE}\r\n")
    plant(tmp_path, "src/c.py", "x = 'custom_layers'\n")
    return tmp_path / "src"


LISTED = f"""\
  src/a.py:2: {M_OLD}.transformer_engine
      import instead: {M_NEW}.transformer_engine
  src/b.cpp:2: redline/transformer/custom_layers/transformer_engine.h
      import instead: redline/extensions/transformer_engine.h
"""


def content(tree: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tree.iterdir()}


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--check"], 1)])
def test_the_list_and_the_check_write_nothing(tree, monkeypatch, capsys, options, status):
    before = content(tree)
    assert run(monkeypatch, *options, "src") == status
    assert content(tree) == before
    hint = "2 uses of an old address in 2 files; to move: redline move --write src\n"
    assert capsys.readouterr().out == LISTED + hint


def test_written_once_there_is_nothing_left(tree, monkeypatch, capsys):
    assert run(monkeypatch, "--write", "src") == 0
    assert capsys.readouterr().out == LISTED + "moved 2 uses of an old address in 2 files\n"
    after = content(tree)
    for options in (["--write"], ["--check"], []):
        assert run(monkeypatch, *options, "src") == 0
        assert capsys.readouterr().out == "nothing to move\n"
    assert content(tree) == after


def test_the_difference_is_a_patch_that_does_what_write_does(tree, monkeypatch, capsysbinary):
    before = content(tree)
    assert run(monkeypatch, "--diff", "src") == 0
    patch = capsysbinary.readouterr().out
    assert content(tree) == before
    subprocess.run(["git", "apply", "-"], input=patch, check=True, cwd=tree.parent)
    patched = content(tree)
    assert patched != before
    for name, was in before.items():
        (tree / name).write_bytes(was)
    run(monkeypatch, "--write", "src")
    assert content(tree) == patched


def test_what_is_left_by_hand_fails_and_is_told(tmp_path, monkeypatch, capsys):
    text = "from megatron.core import transformer as t\nt.custom_layers.transformer_engine.X\n"
    path = plant(tmp_path, "a.py", text)
    for mode in ("--write", "--check", "--diff"):
        assert run(monkeypatch, mode, path) == 1
        told = "".join(capsys.readouterr())
        assert f"{path}:2: {M_OLD}.transformer_engine.X" in told
        assert "reached through another name, to be moved by hand:" in told


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["nowhere"], 1, "redline move: nowhere: no such file or folder\n"),
        (
            ["--check", "--write", "."],
            2,
            "redline move: expected one of --check, --diff and --write, not --check --write\n",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(monkeypatch, capsys, words, status, sentence):
    assert run(monkeypatch, *words) == status
    assert capsys.readouterr().err == sentence


def test_a_missing_libcst_is_one_sentence(tree, monkeypatch, capsys):
    monkeypatch.setattr(move.importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "src") == 1
    pip = f"{sys.executable} -m pip install libcst"
    why = "libcst is missing, which reads and writes Python; install it with"
    assert capsys.readouterr().err == f"redline move: {why}: {pip}\n"


def test_the_mover_needs_neither_torch_nor_the_library():
    code = "import sys; sys.modules['torch'] = None; from redline.move import python, report"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
