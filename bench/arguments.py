"""What bench.py is asked for. Whatever cannot be done is said in one sentence, with status 2."""

import argparse
import importlib
import json
import pathlib
import re
import sys

import torch

import report
import rivals
import targets

ROW = {"name", "direction", "shape", "dtype", "time_us", "spread", "of_redline", "rivals"}


def refuse(sentence):
    print(f"bench: {sentence}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        refuse(message)


def result_in(name):
    """A result file, read."""
    try:
        result = json.loads(pathlib.Path(name).read_text())
    except OSError as error:
        refuse(f"{name}: {error.strerror or error}")
    except ValueError:
        refuse(f"{name} holds no JSON")
    rows = result.get("rows") if isinstance(result, dict) else None
    if rows is None or any(not {*row} >= ROW for row in rows):
        refuse(f"{name} is no result of bench.py")
    return result


def compare(before, after):
    print("\n".join(report.compare(result_in(before), result_in(after))))


def plot(source, target=None):
    result = result_in(source)
    try:
        draw = importlib.import_module("plot").draw
        draw(result, target or pathlib.Path(source).with_suffix(".svg"))
    except ModuleNotFoundError as error:
        refuse(f"plot needs {error.name}")


def markdown(source, target=None):
    text = report.markdown(result_in(source))
    pathlib.Path(target or pathlib.Path(source).with_suffix(".md")).write_text(text)


def show_targets(source):
    print("\n".join(targets.listing(result_in(source))))


COMMANDS = {  # name: what runs, its arguments, how many are needed
    "compare": (compare, "BEFORE.json AFTER.json", 2),
    "markdown": (markdown, "RESULT.json [TABLE.md]", 1),
    "plot": (plot, "RESULT.json [PICTURE.svg]", 1),
    "targets": (show_targets, "RESULT.json", 1),
}


def told(words):
    """Runs a command over result files; False where the words are none."""
    if not words or words[0] not in COMMANDS:
        return False
    name, *given = words
    command, expected, least = COMMANDS[name]
    if {"-h", "--help"} & {*given}:
        print(f"usage: bench.py {name} {expected}")
        return True
    if not least <= len(given) <= len(expected.split()):
        refuse(f"{name} takes {expected}, not {' '.join(given) or 'nothing'}")
    command(*given)
    return True


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def variants(text):
    known = ("redline", *rivals.NAMES, *rivals.PARTS)
    found = text.split(",")
    if unknown := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(f"no variant {unknown[0]!r}, of {', '.join(known)}")
    return found


def new_file(text):
    """Found out before hours of timing, not behind them."""
    if not pathlib.Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder for {text}")
    return text


def parsed(words, known, about):
    def op(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"no op {text!r}, of {', '.join(known)}")
        return text

    parser = Parser(prog="bench.py", description=about)
    parser.add_argument("ops", nargs="*", type=op, metavar="OP", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--markdown", type=new_file)
    parser.add_argument("--rivals", action="store_true", help=rivals.__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows",
        type=pattern,
        default="",
        help="a regular expression: the rows whose name, direction, shape or dtype has it",
    )
    parser.add_argument(
        "--only", type=variants, help="variants to time, by commas: eager,compile,liger; ours too"
    )
    parser.add_argument("--quick", action="store_true", help="the first case of each op")
    parser.add_argument("--commit", help="of this tree, where it was copied without its .git")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("there is no CUDA device")
    return args


def chosen(op, args):
    """The op's cases that were asked for, with the variants that were; cases without any of them
    are left out."""
    for case in importlib.import_module(f"bench_{op}").cases(args.device):
        if args.only:
            wanted = {"redline", *args.only}
            case.calls = {name: call for name, call in case.calls.items() if name in wanted}
        key = f"{case.name} {case.direction} {case.shape} {case.dtype}"
        alone = len(case.calls) == 1 and args.only not in (None, ["redline"])
        if alone or not args.rows.search(key):
            continue
        yield case
        if args.quick:
            return
