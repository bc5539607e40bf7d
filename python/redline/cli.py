"""The command line: `redline dyno`, `doctor`, `move`, `run` and `--version`."""
# Over budget: parameters: typer reads the command line from the signature.

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="redline",
    help="Transformer parts for PyTorch, stock and tuned side by side.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_dyno_extra = {"jinja2", "matplotlib", "numpy", "safetensors", "tokenizers"}  # pyproject.toml's


def _version(wanted: bool) -> None:
    if wanted:
        import redline

        print(f"redline {redline.__version__}")
        raise typer.Exit()


def _path(value: str) -> Path:
    if not value:  # Path("") would be the folder one stands in
        raise typer.BadParameter("expected a path, not nothing")
    return Path(value)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def dyno(  # one parameter per option: the signature is the command line
    steps: Annotated[int, typer.Option(help="Training steps of the lap.")] = 40,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 (float32) or bf16 (bfloat16).")] = "auto",
    text: Annotated[
        Path | None, typer.Option(parser=_path, help="A text file, or a folder of them.")
    ] = None,
    out: Annotated[Path, typer.Option(parser=_path, help="The folder of the report.")] = Path(
        "dyno"
    ),
    compile_parts: Annotated[int, typer.Option(help="Parts to torch.compile too.")] = 6,
) -> int:
    """Train a GPT with stock and with tuned parts, measure every part, write the report."""
    from redline.dyno import Options, run
    from redline.dyno.measure import DynoError

    command = shlex.join(["redline", *sys.argv[1:]])
    try:
        return run(Options(steps, device, dtype, text, out, compile_parts, command))
    except (DynoError, OSError) as error:
        return _fail(f"redline dyno: {error}", 1)
    except ImportError as error:
        if error.name in _dyno_extra:
            line = f"{error.name} is not installed: pip install 'redline-layers[dyno]'"
            return _fail(f"redline dyno: {line}", 1)
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("redline dyno: stopped by Ctrl-C; nothing was written", 130)


@app.command()
def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="A program to search for the old address.")
    ] = None,
) -> int:
    """Say what was found, what is missing, and the command that mends it."""
    from redline import doctor as examination

    return examination.run(path) or 0


@app.command()
def move(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders of them.")],
    check: Annotated[bool, typer.Option("--check", help="List; 1 where there is any.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show what would change.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Rewrite the files.")] = False,
) -> int:
    """List the imports of an old address in Python and C++, or rewrite them to the new one."""
    from redline import move as mover

    given = [
        name
        for name, is_given in {"check": check, "diff": diff, "write": write}.items()
        if is_given
    ]
    if len(given) > 1:
        told = " ".join(f"--{name}" for name in given)
        return _fail(f"redline move: expected one of --check, --diff and --write, not {told}", 2)
    try:
        return mover.run(paths, given[0] if given else "list")
    except mover.MoveError as error:
        return _fail(f"redline move: {error}", 1)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="",
)
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCRIPT | -m MODULE [ARGS]...", help="As after `python`."),
    ] = None,
):
    """Run a program with Redline where it wants Transformer Engine; its old imports are listed."""
    from redline import run as runner

    try:
        return runner.Program.of(words or [])
    except runner.RunError as error:
        return _fail(f"redline run: {error}", 2)


def _fail(line: str, status: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return status


def main() -> None:
    """The console entry: a wrong option is one line, not a page."""
    try:
        status = app(standalone_mode=False)
    except KeyboardInterrupt:
        status = _fail("redline: stopped by Ctrl-C", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer's own errors have in common
            raise
        status = getattr(error, "exit_code", 2)
        if len(sys.argv) > 1:
            status = _fail(f"redline: {error.format_message()}", status)
        else:  # the help: a page
            error.show()
    if callable(status):  # a program: it runs outside of typer, which would take its exceptions
        status = status()
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
