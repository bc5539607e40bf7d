"""What stands at an old address: a notice at each line that takes a name from it, and a forward.

Knows the standard library alone: `redline doctor` and `redline move` read the table of addresses
where neither torch nor the library is there.
"""

import importlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

removal = "2.0"
new_address = {
    "redline.transformer.custom_layers.transformer_engine": "redline.extensions.transformer_engine",
    "megatron.core.transformer.custom_layers.transformer_engine": (
        "megatron.core.extensions.transformer_engine"
    ),
}

# Frames that carry an import to the line that asked for it: by top package, and by module.
_carriers = {"importlib", "_frozen_importlib", "_frozen_importlib_external", "pickle", "torch"}
_ours = {__name__, "redline.megatron.old_address", "redline.run", *new_address}
# They read every name of a module to describe it, and use none.
_describers = {"inspect", "pydoc"}


@dataclass(frozen=True)
class OldImport:
    path: Path
    line: int
    address: str  # what is imported
    replacement: str  # what to import instead


seen: dict[OldImport, None] = {}  # what this process took from an old address, in order


def notice(old: str) -> str:
    return (
        f"{old} has moved to {new_address[old]}: import from there. The old address will be "
        f"removed in Redline {removal}; `redline move` rewrites the imports"
    )


def listing(found: list[OldImport]) -> list[str]:
    """The lines that tell of old imports, without a heading."""
    told = []
    for old in found:
        told.append(f"  {old.path}:{old.line}: {old.address}")
        told.append(f"      import instead: {old.replacement}")
    return told


def taker() -> FrameType:
    """The frame of the line that takes: the nearest that neither is ours nor carries an import."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__") or ""
        if name not in _ours and name.partition(".")[0] not in _carriers:
            break
        frame = frame.f_back
    return frame


def record(old: str) -> None:
    """Notes the line that takes from the address `old`."""
    frame = taker()
    path = Path(frame.f_code.co_filename)
    seen[OldImport(path, frame.f_lineno, old, new_address[old])] = None


class Signpost:
    """The `__getattr__` and `__dir__` of the module at an old address. Making one warns.

    Example, the whole of such a module:

        _post = Signpost(__name__)
        __getattr__, __dir__ = _post.take, _post.names
    """

    def __init__(self, old: str):
        self.old = old
        self._last = (0, 0, 0)
        self._whole = (0, 0, 0)
        self._warn(whole=True)
        self._address = importlib.import_module(new_address[old])

    def take(self, name: str):
        """What the new address has under `name`; warns at the line that asks."""
        if name == "__all__":
            value = self._public()
        elif name.startswith("__") and name.endswith("__"):
            # Forwarded, __path__ would make a package of the old address.
            raise AttributeError(self._lacks(name))
        else:
            try:
                value = getattr(self._address, name)
            except AttributeError:
                raise AttributeError(self._lacks(name)) from None
        self._warn(whole=name == "__all__")
        return value

    def names(self) -> list[str]:
        return dir(self._address)

    def _public(self) -> list[str]:
        named = getattr(self._address, "__all__", None)
        return named or [name for name in vars(self._address) if not name.startswith("_")]

    def _lacks(self, name: str) -> str:
        return f"module {self.old!r} has no attribute {name!r}"

    def _warn(self, whole: bool = False) -> None:
        """One warning per statement: `from … import a, b` asks twice, at rising places.

        With `whole`, the instruction itself asks on: a star for each name, an unpickling for one.
        """
        frame = taker()
        if (frame.f_globals.get("__name__") or "").partition(".")[0] in _describers:
            return
        here = (id(frame), frame.f_lineno, frame.f_lasti)
        further = here[:2] == self._last[:2] and here[2] > self._last[2]
        if not further and here != self._whole:
            record(self.old)
            warnings.warn_explicit(
                notice(self.old),
                DeprecationWarning,
                frame.f_code.co_filename,
                frame.f_lineno,
                module=frame.f_globals.get("__name__"),
                registry=frame.f_globals.setdefault("__warningregistry__", {}),
            )
        self._last = here
        self._whole = here if whole else self._whole
