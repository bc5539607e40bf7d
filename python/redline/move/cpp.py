"""The old address in C++: includes and fully qualified names, outside comments and strings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

suffixes = {".h", ".hh", ".hpp", ".hxx", ".cuh", ".c", ".cc", ".cpp", ".cxx", ".cu", ".inl", ".ipp"}
old_folder = "redline/transformer/custom_layers/"
new_folder = "redline/extensions/"

_token = re.compile(
    r"""
    //(?:\\\r?\n|[^\n])*
    | /\*.*?\*/
    | (?<!\w)(?:u8|[uUL])?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"
    | (?P<unclosed>/\*|(?<!\w)(?:u8|[uUL])?R"[^()\\\s]{0,16}\()
    | ^[^\S\n]*\#[^\S\n]*include[^\S\n]*[<"](?P<include>[^>"\n]+)[>"]
    | "(?:\\.|[^"\\\n])*"
    | \d(?:'?[\w.])*                   # a digit separator is no quotation mark
    | '(?:\\.|[^'\\\n])*'
    | (?<![\w:])(?:::\s*)?(?P<name>redline\s*::\s*transformer\s*::\s*custom_layers)(?!\w)
    | \w+
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Edit:
    start: int
    end: int
    old: str
    new: str


def edits(text: str) -> Iterator[Edit]:
    """What is to be replaced, in order. Raises ValueError for a source that cannot be read."""
    for token in _token.finditer(text):
        if token["unclosed"]:
            line = text.count("\n", 0, token.start()) + 1
            kind = "comment" if token["unclosed"] == "/*" else "string"
            raise ValueError(f"the {kind} that begins in line {line} does not end")
        if token["name"]:
            yield Edit(*token.span("name"), token["name"], "redline::extensions")
        elif token["include"] and f"/{old_folder}" in f"/{token['include']}":
            before, _, behind = token["include"].rpartition(old_folder)
            yield Edit(*token.span("include"), token["include"], before + new_folder + behind)


def moved(text: str, staying: set[int]) -> str:
    """The text with the new address, but for the lines that are to stay."""
    parts, end = [], 0
    for edit in edits(text):
        if text.count("\n", 0, edit.start) + 1 not in staying:
            parts += [text[end : edit.start], edit.new]
            end = edit.end
    return "".join([*parts, text[end:]])
