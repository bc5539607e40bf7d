"""The table of a dry run."""

from rich.console import Console
from rich.table import Table

from redline.tune.plan import rows
from redline.tune.savings import bytes_per_token


def show(model, parts) -> None:
    """Prints part, count, what it becomes and what that saves, or why it was left."""
    table = Table(title=f"redline.tune, {type(model).__name__}")
    table.add_column("part", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("becomes, or why left", overflow="fold")
    table.add_column("saved", justify="right", no_wrap=True)
    total = 0
    for row in rows(parts):
        part, counted = row[0], [part.example() for part in row if part.example]
        saved = sum(map(bytes_per_token, counted))
        total += saved
        becomes = part.says if part.swap else f"left: {part.says}"
        table.add_row(part.name, str(len(row)), becomes, f"{saved:,.0f}" if counted else "")
    table.caption = f"backward keeps {total:,.0f} bytes per token less than stock"
    Console().print(table)
