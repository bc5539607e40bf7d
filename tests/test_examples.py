"""train_gpt: the same losses in C++ and Python, and a checkpoint that can be trusted."""

import json
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import cases

pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]
SIZES = {"steps": 6, "batch": 2, "sequence": 16, "layers": 2, "hidden": 32, "ffn": 48, "heads": 4}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
PYTHON = [sys.executable, ROOT / "examples/python/train_gpt.py"]


def cpp():
    return [cases.built_program("train_gpt")]


def run(program, *arguments, check=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [*program, *SMALL, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not check or ran.returncode == 0, ran.stderr
    return ran


def losses(program, *arguments):
    return run(program, *arguments).stdout.splitlines()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(__file__).read_bytes())
    return path


@pytest.fixture(scope="module")
def expected(text):
    return losses(PYTHON, "--text", text)


@pytest.fixture
def says(text, monkeypatch):
    """What each example leaves with. Python's in this process: its start alone takes seconds."""

    def python(*arguments):
        words = (PYTHON[1], *SMALL, "--text", text, *arguments)
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(PYTHON[1]), run_name="__main__")
        return left.value.code

    def cplusplus(*arguments):
        ran = run(cpp(), "--text", text, *arguments, check=False)
        assert ran.returncode == 1
        return ran.stderr.rstrip("\n")

    return {"python": python, "cpp": cplusplus}


def test_losses_fall(expected):
    values = [float(line.split()[-1]) for line in expected]
    assert len(values) == 6
    assert values[-1] < values[0]


def test_cpp_and_python_agree_bit_for_bit(text, expected):
    assert losses(cpp(), "--text", text) == expected


@pytest.mark.parametrize("device", cases.DEVICES[1:])
@pytest.mark.parametrize("language", ["python", "cpp"])
def test_a_gpu_gives_near_losses(language, text, expected, device):
    program = PYTHON if language == "python" else cpp()
    ours = [float(line.split()[-1]) for line in losses(program, "--text", text, "--device", device)]
    assert ours == pytest.approx([float(line.split()[-1]) for line in expected], rel=1e-3)


def test_token_files_agree_with_bytes(text, expected, tmp_path):
    tokens = tmp_path / "tokens.bin"
    data = text.read_bytes()
    tokens.write_bytes(struct.pack(f"<{len(data)}H", *data))
    assert losses(PYTHON, "--tokens", tokens) == expected
    assert losses(cpp(), "--tokens", tokens) == expected


@pytest.mark.parametrize("first", ["python", "cpp"])
@pytest.mark.parametrize("second", ["python", "cpp"])
def test_resuming_is_as_never_having_stopped(first, second, text, expected, tmp_path):
    programs = {"python": PYTHON, "cpp": None if "cpp" not in (first, second) else cpp()}
    checkpoint = ["--text", text, "--checkpoint", tmp_path / "model.safetensors"]
    started = losses(programs[first], *checkpoint, "--steps", "3")
    assert started + losses(programs[second], *checkpoint) == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def spoil_truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def spoil_headless(path):
    path.write_bytes(b"abc")


def spoil_foreign_format(path):
    path.write_bytes(b"PK\x03\x04" + bytes(400))


def spoil_foreign_metadata(path):
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("language", ["python", "cpp"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_truncated, "not a whole safetensors file"),
        (spoil_headless, "not a whole safetensors file"),
        (spoil_foreign_format, "not a whole safetensors file"),
        (spoil_foreign_metadata, "not a checkpoint of train_gpt: its format is pt"),
    ],
)
def test_spoilt_checkpoints_are_refused(language, spoil, reason, text, tmp_path):
    program = PYTHON if language == "python" else cpp()
    path = tmp_path / "model.safetensors"
    run(program, "--text", text, "--checkpoint", path, "--steps", "1")
    spoil(path)
    spoilt = path.read_bytes()
    ran = run(program, "--text", text, "--checkpoint", path, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"train_gpt: {path}: {reason}")
    assert len(ran.stderr.splitlines()) == 1
    assert path.read_bytes() == spoilt


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_another_models_checkpoint_is_refused(language, text, tmp_path):
    program = PYTHON if language == "python" else cpp()
    arguments = ["--text", text, "--checkpoint", tmp_path / "model.safetensors"]
    run(program, *arguments, "--steps", "1")
    ran = run(program, *arguments, "--hidden", "64", check=False)
    assert "expected vocabulary=256 layers=2 hidden=64" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_missing_and_short_texts_are_one_line(language, tmp_path):
    program = PYTHON if language == "python" else cpp()
    missing = run(program, "--text", tmp_path / "none.txt", check=False)
    assert missing.stderr == f"train_gpt: {tmp_path}/none.txt: No such file or directory\n"
    (tmp_path / "short.txt").write_text("short")
    short = run(program, "--text", tmp_path / "short.txt", check=False)
    assert "expected more than 16 tokens" in short.stderr
    assert len(short.stderr.splitlines()) == 1


@pytest.mark.parametrize("language", ["python", "cpp"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("heads", "6", "Attention: heads: expected a divisor of hidden_size 32, not 6"),
        ("kv-heads", "3", "Attention: kv_heads: expected a divisor of 4, not 3"),
        ("heads", "32", "Attention: rotary_dim: expected an even number up to the head_dim 1"),
        ("heads", "0", "--heads: expected a whole number of 1 or more, not 0"),
        ("batch", "0", "--batch: expected a whole number of 1 or more, not 0"),
        ("sequence", "0", "--sequence: expected a whole number of 1 or more, not 0"),
        ("hidden", "1e2", "--hidden: expected a whole number of 1 or more, not 1e2"),
        ("seed", "-1", "--seed: expected a whole number of 0 or more, not -1"),
        ("learning-rate", "-1", "--learning-rate: expected a positive number, not -1"),
        ("learning-rate", "inf", "--learning-rate: expected a positive number, not inf"),
        ("device", "foo", "--device: expected cpu, cuda or cuda:N, not foo"),
        ("device", "cuda:999", "--device: cuda:999: torch sees "),
    ],
)
def test_a_bad_argument_is_one_line(language, option, value, message, says):
    said = says[language](f"--{option}", value)
    assert said.startswith(f"train_gpt: {message}")
    assert "\n" not in said


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_an_unwritable_checkpoint_is_one_line(language, text, tmp_path):
    program = PYTHON if language == "python" else cpp()
    path = tmp_path / "none" / "model.safetensors"
    ran = run(program, "--text", text, "--checkpoint", path, "--steps", "1", check=False)
    assert ran.stderr == f"train_gpt: {path}: No such file or directory\n"


def test_tune_llama_learns_the_same_before_and_after(text):
    program = [sys.executable, ROOT / "examples/python/tune_llama.py"]
    ran = run(program, "--text", text, "--vocabulary", "300")
    *_, stock, tuned, difference = ran.stdout.splitlines()
    assert stock.startswith("stock ")
    assert tuned.startswith("tuned ")
    assert float(difference.split()[-1]) < 1e-4
