"""`redline run`: a program as Python runs it, with Redline where it wants Transformer Engine.

The program finds sys.argv, sys.path[0] and __main__ as `python` would leave them, and ends as from
there: same exit code, same traceback, no frame of ours in it.
"""

import atexit
import importlib.util
import io
import os
import pkgutil
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

from redline import signpost


class RunError(Exception):
    """A request that cannot be carried out, in one sentence."""


@dataclass(frozen=True)
class Program:
    name: str  # a path, or a module's name
    arguments: list[str]
    is_module: bool = False

    @classmethod
    def of(cls, words: list[str]) -> "Program":
        """The program that the words after `redline run` name."""
        first, *rest = words or [""]
        if first == "-m" and rest:
            return cls(rest[0], rest[1:], is_module=True)
        if first.startswith("-m") and len(first) > 2:
            return cls(first[2:], rest, is_module=True)
        if not first or first == "-m":
            raise RunError("expected a script, or -m and a module: redline run train.py --lr 1e-3")
        if first.startswith("-"):
            python = "python -X dev -m redline run train.py"
            raise RunError(f"expected a script, not {first}; Python's own options: {python}")
        return cls(first, rest)

    def __call__(self) -> int:
        """Runs it; what it raises comes out of here. A refusal is one line and a status."""
        try:
            prepare()
        except (ImportError, RuntimeError) as error:
            print(f"redline run: {error}", file=sys.stderr)
            return 1
        try:
            start(self)
        except RunError as error:
            print(f"redline run: {error}", file=sys.stderr)
            return 1 if self.is_module else 2
        except SystemExit:
            raise
        except BaseException as error:
            _hide_our_frames(error)
            raise
        return 0


class Watch:
    """Notes who imports an old address, and finds nothing: Megatron may ship one of its own."""

    def find_spec(self, name, path=None, target=None) -> None:
        if name in signpost.new_address:
            signpost.record(name)


def prepare() -> None:
    """Puts Redline in Transformer Engine's place, and watches the old addresses."""
    from redline import megatron

    megatron.install()
    megatron.restore_old_address()
    sys.meta_path.insert(0, Watch())
    if os.environ.get("RANK", "0") == "0":  # of torchrun's many, one tells
        atexit.register(tell)


def tell() -> None:
    """Lists on stderr the old imports that were seen: Python hides most of their warnings."""
    found = list(signpost.seen)
    if not found:
        return
    plural = "s" if len(found) > 1 else ""
    print(f"redline run: {len(found)} import{plural} of an old address:", file=sys.stderr)
    print("\n".join(signpost.listing(found)), file=sys.stderr)
    print("to rewrite them: redline move --write PATH", file=sys.stderr)


def start(program: Program) -> None:
    """Runs the program in a __main__ of its own, which stays: threads and pickles look there."""
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    code = _module(program, main) if program.is_module else _script(program, main)
    exec(code, vars(main))


def _script(program: Program, main: ModuleType) -> CodeType:
    path = os.path.abspath(program.name)
    sys.argv = [program.name, *program.arguments]
    importer = pkgutil.get_importer(path)
    spec = importer.find_spec("__main__") if importer else None
    if spec is not None:  # a folder or an archive with a __main__
        _set_path(path)
        return _describe(main, spec)
    _set_path(os.path.dirname(os.path.realpath(path)))
    main.__file__, main.__cached__ = path, None
    main.__loader__ = SourceFileLoader("__main__", path)
    try:
        with io.open_code(path) as file:
            return compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        raise RunError(f"{program.name}: {error.strerror}") from None


def _module(program: Program, main: ModuleType) -> CodeType:
    sys.argv = ["-m", *program.arguments]
    _set_path(os.getcwd())
    name = program.name
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec, name = _find(f"{name}.__main__"), f"{name}.__main__"
    if spec is None or spec.loader is None:
        raise RunError(f"no module named {name}")
    code = _describe(main, spec)
    sys.argv[0] = spec.origin
    return code


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _describe(main: ModuleType, spec: ModuleSpec) -> CodeType:
    main.__spec__, main.__loader__ = spec, spec.loader
    main.__file__, main.__cached__ = spec.origin, spec.cached
    main.__package__ = spec.parent
    return spec.loader.get_code(spec.name)


def _set_path(first: str) -> None:
    """sys.path[0] as Python sets it, which we have had from it for our own start."""
    if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        sys.path[0] = first


def _hide_our_frames(error: BaseException) -> None:
    """Has the excepthook, the program's own too, begin the traceback with the program."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals is globals():
        traceback = traceback.tb_next
    hook = sys.excepthook

    def excepthook(kind, value, given):
        if value is error:
            value, given = value.with_traceback(traceback), traceback
        hook(kind, value, given)

    sys.excepthook = excepthook
