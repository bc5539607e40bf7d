"""The old address in Python, rewritten with libcst: all else stays as it is written."""

import re

import libcst as cst
from libcst.helpers import get_full_name_for_node
from libcst.metadata import MetadataWrapper, PositionProvider

from redline.move import search
from redline.move.search import in_string, renamed, renamed_string, table


class _Mover(cst.CSTTransformer):
    """What it cannot rewrite with certainty it leaves; the search then finds it again."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, package: str, bound: dict[str, str], staying: set[int]):
        super().__init__()
        self.package = package
        self.bound = bound
        self.staying = staying

    def stays(self, node: cst.CSTNode) -> bool:
        place = self.get_metadata(PositionProvider, node)
        return not self.staying.isdisjoint(range(place.start.line, place.end.line + 1))

    def visit_Import(self, node):
        return not self.stays(node)

    def visit_ImportFrom(self, node):
        return not self.stays(node)

    def leave_ImportFrom(self, original_node, updated_node):
        name = get_full_name_for_node(original_node.module) if original_node.module else ""
        module = search.absolute(name, len(original_node.relative), self.package)
        if not module or self.stays(original_node):
            return updated_node
        if renamed(module):
            return _from(updated_node, renamed(module), updated_node.names)
        if isinstance(updated_node.names, cst.ImportStar):
            return updated_node
        return _divided(updated_node, module)

    def leave_SimpleStatementLine(self, original_node, updated_node):
        """An import that was divided gets a line for each part, where it had one to itself."""
        first, *rest = updated_node.body
        if len(original_node.body) > 1 or not rest:
            return updated_node
        lines = [cst.SimpleStatementLine([part]) for part in rest]
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        head = cst.SimpleStatementLine([first], updated_node.leading_lines)
        return cst.FlattenSentinel([head, *lines])

    def leave_Attribute(self, original_node, updated_node):
        root, _, rest = (get_full_name_for_node(original_node) or "").partition(".")
        reached = self.bound.get(root, root)
        new = table.get(f"{reached}.{rest}")
        if new is None or renamed(reached) or self.stays(original_node):
            return updated_node
        if reached != root and not new.startswith(reached + "."):
            return updated_node
        chain = cst.parse_expression(root + new.removeprefix(reached) if reached != root else new)
        return chain.with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)

    def leave_SimpleString(self, original_node, updated_node):
        value = original_node.evaluated_value
        if not isinstance(value, str) or not renamed_string(value) or self.stays(original_node):
            return updated_node
        return updated_node.with_changes(value=_substituted(original_node.value))

    def leave_FormattedStringText(self, original_node, updated_node):
        if not renamed_string(original_node.value) or self.stays(original_node):
            return updated_node
        return updated_node.with_changes(value=_substituted(original_node.value))

    def visit_ConcatenatedString(self, node):
        value = node.evaluated_value
        return not isinstance(value, str) or renamed_string(value) is not None

    def leave_ConcatenatedString(self, original_node, updated_node):
        value = original_node.evaluated_value
        wanted = renamed_string(value) if isinstance(value, str) else None
        if wanted is None or updated_node.evaluated_value == wanted or self.stays(original_node):
            return updated_node
        if not re.fullmatch(r"[\w.:/-]+", wanted):  # it would have to be quoted anew
            return updated_node
        quote = original_node.left.quote
        whole = cst.SimpleString(f"{quote}{wanted}{quote}")
        return whole.with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)


def _substituted(literal: str) -> str:
    return in_string.sub(lambda found: table[found[1]], literal)


def _from(node: cst.ImportFrom, module: str, names) -> cst.ImportFrom:
    """The statement with another module, by its whole name, and other names."""
    blank = cst.SimpleWhitespace(" ") if node.whitespace_after_from.empty else None
    spaced = {"whitespace_after_from": blank} if blank else {}
    return node.with_changes(
        module=cst.parse_expression(module), relative=(), names=names, **spaced
    )


def _divided(node: cst.ImportFrom, module: str):
    """`from package import …`, where some of the names are old modules."""
    kept, moved = [], {}
    for alias in node.names:
        new = renamed(f"{module}.{alias.name.value}")
        if new is None:
            kept.append(alias)
            continue
        parent, _, leaf = new.rpartition(".")
        moved.setdefault(parent, []).append(_renamed_alias(alias, leaf))
    if not kept:
        ((parent, names),) = moved.items()
        return _from(node, parent, names)
    if not moved:
        return node
    kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    parts = [
        cst.ImportFrom(
            cst.parse_expression(parent),
            [name.with_changes(comma=cst.MaybeSentinel.DEFAULT) for name in names],
        )
        for parent, names in moved.items()
    ]
    return cst.FlattenSentinel([node.with_changes(names=kept), *parts])


def _renamed_alias(alias: cst.ImportAlias, leaf: str) -> cst.ImportAlias:
    """The alias under its new name; what it binds keeps its old one."""
    asname = alias.asname
    if asname is None and leaf != alias.name.value:
        asname = cst.AsName(name=cst.Name(alias.name.value))
    return alias.with_changes(name=cst.Name(leaf), asname=asname)


def moved(text: str, package: str = "") -> str:
    """The text with the new addresses; `package` is what `from . import` means in it.

    Raises search.Unreadable for what Python or libcst cannot parse.
    """
    bound = search.bound_names(search.parse(text), package)
    try:
        module = cst.parse_module(text)
        if module.code != text:
            raise search.Unreadable("libcst reads it in another way than it is written")
        mover = _Mover(package, bound, search.staying_lines(text))
        return MetadataWrapper(module, unsafe_skip_copy=True).visit(mover).code
    except (cst.ParserSyntaxError, RecursionError) as error:
        raise search.Unreadable(f"libcst cannot parse it: {error}") from None
