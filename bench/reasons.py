"""Why a row is short of its target or behind a rival: results/reasons.toml, kept by hand, so that
a table made anew from its JSON says it again."""

import fnmatch
import functools
import pathlib
from dataclasses import dataclass

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; the build has it there
    import tomli as tomllib

FILE = pathlib.Path(__file__).parent / "results" / "reasons.toml"
FIELDS = {"gpu", "op", "direction", "shape", "against", "why", "doc"}


@dataclass(frozen=True)
class Reason:
    why: str
    doc: str = ""  # a section of docs/, "norm.md#forward"

    def link(self):
        """As it is written in bench/results."""
        if not self.doc:
            return self.why
        return f"{self.why} ([{self.doc.split('#')[0]}](../../docs/{self.doc}))"

    def plain(self):
        return f"{self.why} (docs/{self.doc})" if self.doc else self.why


NONE = Reason("no reason given")


@functools.cache
def entries():
    found = tomllib.loads(FILE.read_text())["reason"]
    for entry in found:
        unknown = {*entry} - FIELDS
        if unknown or "why" not in entry or "against" not in entry:
            raise ValueError(f"{FILE}: an entry has {sorted(entry)}, of {sorted(FIELDS)}")
    return found


def fits(patterns, text):
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


def find(gpu, row, against):
    """The first entry that fits: `against` is "target" or a rival."""
    fields = {"gpu": gpu, "op": row["name"], "against": against}
    fields |= {key: row[key] for key in ("direction", "shape")}
    for entry in entries():
        if all(fits(entry.get(key, "*"), text) for key, text in fields.items()):
            return Reason(entry["why"], entry.get("doc", ""))
    return NONE
