"""Rotary embedding: q and k in one pass, and tables that are not rounded to 16 bits."""

import inspect
from functools import partial, update_wrapper
from types import CellType, FunctionType

import torch

from redline import ops
from redline.tune.recognise import Owner, calls, fingerprint, unknown_source, unwrapped
from redline.tune.swap import ALREADY, Part, Tuned, left, parts_of, swapped

APPLY = "apply_rotary_pos_emb"
KNOWN = (
    (APPLY, "e7caf662a25e"),
    (APPLY, "169bf3599666"),  # the first rotary_dim elements of a head
    (APPLY, "c9c9b984851a"),  # in float32
    ("rotate_half", "4f4d4ef8f207"),
)
# Forwards whose two halves of a table are equal, and which read of x only its device and dtype.
ROUNDED_TABLES = (
    "e248625f358e",
    "6dd156f0f823",
    "5618fd30885c",
    "d118b14ecfb8",
    "c18c36bccced",
    "7ec741aa9803",
    "e6f48afdf21f",
    "246495216eda",
    "aab741e69197",
    "9b830f86b8df",
)
FLOAT32_TABLES = ("a6faf1c1b0e4", "630c3e397431", "abae4e6afd45", "388cbdaf38b6")


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' function of that name by redline.ops.rotary_pair, in float32, rounded once.

    q, k: [batch, heads, seq, head_dim], or [batch, seq, heads, head_dim] with `unsqueeze_dim` 2.
    cos, sin: [1 or batch, seq, rotary_dim] with equal halves. Returns q's and k's dtypes.
    """
    half = cos.shape[-1] // 2
    tables = [table.flatten(0, 1)[:, :half].float() for table in (cos, sin)]
    by_token = [x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k)]
    # One table row per token where sequences differ: they become one long sequence.
    one_long = cos.shape[0] != 1
    pair = [x.flatten(0, 1).unsqueeze(0) if one_long else x for x in by_token]
    if q.dtype == k.dtype:
        turned = ops.rotary_pair(*pair, *tables)
    else:
        turned = [ops.rotary(x, *tables) for x in pair]
    turned = (y.view(x.shape) for x, y in zip(by_token, turned, strict=True))
    return tuple(y.transpose(1, 2) if unsqueeze_dim == 1 else y for y in turned)


def without_kernels(function):
    """The function of which the package `kernels`, where it is installed, makes a module.

    With a kernel of the hub in force the module has a forward of its own, and is given back.
    """
    kind = type(function)
    if kind.__module__.split(".")[0] != "kernels" or "forward" in vars(function):
        return function
    return inspect.getclosurevars(kind.forward).nonlocals.get("func")


def rebound(function, name: str, value):
    """`function`, decorators included, with its global `name` bound to `value`."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        names = {**function.__globals__, name: value}
        # Without its module's name torch.compile reads these globals and not the module's.
        del names["__name__"]
        cells = function.__closure__
    else:
        names, inner = function.__globals__, rebound(inner, name, value)
        cells = tuple(
            CellType(inner) if cell.cell_contents is function.__wrapped__ else cell
            for cell in function.__closure__
        )
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    del copy.__wrapped__
    if inner is not None:
        copy.__wrapped__ = inner
    return copy


class RotaryAttention(Tuned):
    """The stock forward itself, with another function under the name of its rotary embedding."""

    op = "ops.rotary_pair"

    @classmethod
    def recognises(cls, stock):
        if not calls(stock.forward, APPLY):
            return f"{stock.__name__}.forward does not call {APPLY}"
        names = unwrapped(stock.forward).__globals__
        unknown = unknown_source({**names, APPLY: without_kernels(names.get(APPLY))}, KNOWN)
        return unknown and f"the source of {unknown} is not one that is known"

    @classmethod
    def namespace(cls, stock):
        return {"forward": rebound(stock.forward, APPLY, apply_rotary_pos_emb)}


class RotaryTables(Tuned):
    """cos and sin as stock computes them, in float32, without the rounding to x's dtype."""

    op = "float32 cos and sin, once per model"

    @classmethod
    def recognises(cls, stock):
        if fingerprint(unwrapped(stock.forward)) in ROUNDED_TABLES:
            return None
        return f"the source of {stock.__name__}.forward is not one that is known"

    def forward(self, x, *args, **kwargs):
        return super().forward(x.new_empty(0, dtype=torch.float32), *args, **kwargs)


def parts(owner: Owner) -> list[Part]:
    stock, name = owner.family.stock("Attention"), owner.family.prefix + "Attention"
    if not hasattr(owner.family.module, APPLY):
        return []
    found = parts_of(owner, stock, name, partial(_attention, owner))
    for part in found:
        part.name += ": rotary"
    tables = owner.family.stock("RotaryEmbedding")
    settled = all(part.swap or part.says == ALREADY for part in found)
    name = owner.family.prefix + "RotaryEmbedding"
    return found + parts_of(owner, tables, name, partial(_tables, settled))


def _tables(settled, module) -> Part:
    if fingerprint(unwrapped(type(module).forward)) in FLOAT32_TABLES:
        return left(module, "its tables are float32 in stock", expected=True)
    if not settled:
        return left(module, "an attention that was left reads its tables", expected=True)
    return swapped(module, RotaryTables)


def _attention(owner, module) -> Part:
    tables = getattr(owner.model, "rotary_emb", None)
    stock = owner.family.stock("RotaryEmbedding")
    known = isinstance(tables, stock or ()) and fingerprint(unwrapped(stock.forward))
    if known not in ROUNDED_TABLES + FLOAT32_TABLES:
        return left(module, f"its tables come from {type(tables).__name__}, which is not known")
    return swapped(module, RotaryAttention)
