#!/usr/bin/env python3
"""Writes the tables of docs/megatron.md from what the code says of each name.

write_megatron_table.py            writes them
write_megatron_table.py --check    fails where the file differs
"""

import argparse
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "python"))
page = root / "docs" / "megatron.md"


def between(text: str, name: str, lines: list[str]) -> str:
    """The text with the lines between the marks of that name."""
    opening, closing = f"<!-- {name}: by tools/write_megatron_table.py -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(opening)
    _, found, after = rest.partition(closing)
    if not found:
        sys.exit(f"redline: {page.name}: expected the marks {opening} and {closing}")
    return "\n".join([before + opening, *lines, closing + after])


def written(text: str) -> str:
    """The page with its tables as the code has them."""
    from redline.extensions import transformer_engine  # noqa: F401  (every name says what it is)
    from redline.extensions.transformer_engine import refusals, table

    text = between(text, "names", list(table.rows()))
    return between(text, "options", list(table.option_rows(refusals.LAYERS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where it differs")
    check = parser.parse_args().check
    before = page.read_text()
    after = written(before)
    if check and after != before:
        sys.exit(f"redline: {page.name} is not what the code says: tools/write_megatron_table.py")
    page.write_text(after)


if __name__ == "__main__":
    main()
