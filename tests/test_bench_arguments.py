"""The words that bench.py takes, and what it says of those that it does not."""

import json
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "bench"))

import arguments  # noqa: E402
import bench  # noqa: E402
from test_bench import result_of, row_of  # noqa: E402


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compare", "compare takes BEFORE.json AFTER.json, not nothing"),
        ("compare one.json", "compare takes BEFORE.json AFTER.json, not one.json"),
        ("compare none.json none.json", "none.json: No such file or directory"),
        ("plot", "plot takes RESULT.json [PICTURE.svg], not nothing"),
        ("plot none.json", "none.json: No such file or directory"),
        ("targets", "targets takes RESULT.json, not nothing"),
        ("targets none.json", "none.json: No such file or directory"),
        ("targets a b", "targets takes RESULT.json, not a b"),
        ("markdown empty.json", "empty.json holds no JSON"),
        ("targets list.json", "list.json is no result of bench.py"),
        ("targets rows.json", "rows.json is no result of bench.py"),
        ("norm --rows (", "argument --rows: '(' is no regular expression: missing )"),
        ("norm --only eagre", "argument --only: no variant 'eagre', of redline, eager"),
        ("nrom", "argument OP: no op 'nrom', of activation"),
        ("norm --json no/folder.json", "argument --json: there is no folder for no/folder.json"),
        ("norm --device gpu", "argument --device: invalid choice: 'gpu'"),
        ("norm --device cpu --rows nothing", "no row was asked for"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda _: {"copy_gb_s": 1.0, "gemm_tflop_s": 1.0})
    for name, text in (("empty", ""), ("list", "[1]"), ("rows", '{"rows": [{"name": "x"}]}')):
        Path(f"{name}.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split(" ")])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bench: {sentence}")
    assert said.count("\n") == 1


def test_the_commands_over_files_do_what_they_say(tmp_path, monkeypatch, capsys):
    source = tmp_path / "gpu.json"
    result = result_of(row_of(name="rms_norm", shape="16384 x 4096")) | {"driver": "580"}
    source.write_text(json.dumps(result))
    for words in (("targets", source), ("compare", source, source), ("markdown", source)):
        assert arguments.told([*map(str, words)])
    said = capsys.readouterr().out
    assert "short" in said
    assert "1 same" in said
    assert source.with_suffix(".md").read_text().startswith("# GPU\n")
    assert not arguments.told(["norm"])
    assert arguments.told(["markdown", str(source), "--help"])
    assert capsys.readouterr().out == "usage: bench.py markdown RESULT.json [TABLE.md]\n"


def test_help_lists_ops_alone(capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments.parsed(["--help"], ["norm", "rope"], "about")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "of norm, rope" in said
    assert "[]" not in said
