"""What stands behind each public name, said where it is defined; docs/megatron.md lists it."""

from dataclasses import dataclass

ENTRIES = {}


@dataclass(frozen=True)
class Entry:
    status: str  # works, composition, refused
    behind: str
    refuses: str = ""


def works(behind, refuses="", status="works"):
    """Marks a class or function that stands on Redline's ops."""

    def mark(thing):
        ENTRIES[thing.__name__] = Entry(status, behind, refuses)
        return thing

    return mark


def composed(behind, refuses=""):
    """Marks one that composes torch's operations, because there is no op of Redline's."""
    return works(behind, refuses, "composition")


def rows():
    """The lines of the table of names, in Markdown."""
    yield "| name | status | behind it | what it refuses |"
    yield "| --- | --- | --- | --- |"
    for name, entry in sorted(ENTRIES.items(), key=lambda item: item[0].lower()):
        yield f"| `{name}` | {entry.status} | {entry.behind} | {entry.refuses} |"


def option_rows(options):
    """The lines of the table of what a configuration may not ask for, in Markdown."""
    yield "| option | built | otherwise |"
    yield "| --- | --- | --- |"
    for name, (values, instead) in options.items():
        built = ", ".join(f"`{value}`" for value in values)
        yield f"| `{name}` | {built} | {instead} |"
