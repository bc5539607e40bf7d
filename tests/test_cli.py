"""The command line: what it refuses, and what it says when it is stopped."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import redline as package
from redline.dyno import DTYPES


def redline(*arguments, **options):
    return run_python("-m", "redline", *arguments, **options)


def run_python(*arguments, **options):
    source = Path(package.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=120, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dyno", "--dtype", "int3"), "--dtype: expected auto fp32"),
        (("dyno", "--dtype", "fp16"), "--dtype: expected auto fp32"),
        (("dyno", "--device", "tpu"), "--device: expected auto cpu cuda, not tpu"),
        (("dyno", "--steps", "0"), "--steps: expected at least 1, not 0"),
        (("dyno", "--steps", "many"), "--steps"),
        (("dyno", "--text", "/no/such"), "no such file"),
        (("dyno", "--text", ""), "expected a path, not nothing"),
        (("dyno", "--bogus"), "No such option"),
        (("bogus",), "No such command"),
    ],
)
def test_bad_option_is_one_line(arguments, message, tmp_path):
    done = redline(*arguments, cwd=tmp_path)
    assert done.returncode not in (0, None) and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_arguments_the_help_is_a_page(tmp_path):
    bare, asked = redline(cwd=tmp_path), redline("--help", cwd=tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert bare.returncode == 2 and (bare.stdout + bare.stderr).strip() == asked.stdout.strip()
    for command in ("dyno", "doctor", "move", "run"):
        assert re.search(rf"^  {command} ", asked.stdout, re.MULTILINE), command


def test_a_text_that_is_refused_shows_no_bar(tmp_path):
    done = redline("dyno", "--text", "/no/such", cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr == "redline dyno: --text: /no/such: no such file or folder\n"


def test_the_help_names_every_dtype(tmp_path):
    shown = redline("dyno", "--help", cwd=tmp_path).stdout
    line = re.search(r"--dtype.*?\[default", shown, re.DOTALL)[0]
    for dtype in DTYPES:
        assert re.search(rf"\b{dtype}\b", line), dtype


def test_missing_package_names_the_extra(tmp_path):
    program = "import sys; sys.modules['jinja2'] = None; from redline.cli import main; main()"
    done = run_python("-c", program, "dyno", cwd=tmp_path)
    expected = "redline dyno: jinja2 is not installed: pip install 'redline-layers[dyno]'\n"
    assert (done.returncode, done.stderr) == (1, expected)


# The dyno with a model of no size, so that its lap begins at once; each step is a line.
LAP = """
from redline import cli
from redline.dyno import job, stock

run_lap = job.run_lap
job.shape_for = lambda *_: stock.Shape(
    vocabulary=320, hidden=32, ffn=48, layers=1, heads=4, kv_heads=2, sequence=16, batch=2
)
job.run_lap = lambda setup, batches, on_step: run_lap(
    setup, batches, lambda step: print("step", step, flush=True)
)
cli.main()
"""


def test_ctrl_c_in_the_lap_is_one_line(tmp_path):
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    command = [sys.executable, "-c", LAP, "dyno", "--text", "text", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--device", "cpu"],
        cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background jobs, and so their children, are born with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        while not (line := process.stdout.readline()).startswith("step 3"):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "redline dyno: stopped by Ctrl-C; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
