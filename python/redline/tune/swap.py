"""The mechanism: a tuned module is the stock module under a subclass of its class.

Only ``module.__class__`` changes. Parameters, buffers, hooks, children, names and the training flag
stay in the instance's own dictionary; `isinstance`, lookups by class name and `super()` see the
stock class, because it is a base and lends its name. A forward bound to the instance would not
follow it into pickles and data parallel replicas; a new module in its place would lose hooks and
every reference that PEFT or a user holds.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from redline.tune.recognise import Owner, unknown_source

ALREADY = "tuned already"


class Tuned:
    """Base of what modules become.

    known: (name, fingerprint) of the stock methods that `forward` replaces. op: its table entry.
    """

    known = ()
    op = ""
    stock: type
    part: type
    kind: str | None = None

    @classmethod
    def recognises(cls, stock: type) -> str | None:
        """None, or why the arithmetic of `stock` is not known."""
        unknown = unknown_source(vars(stock), cls.known)
        return unknown and f"the source of {stock.__name__}.{unknown} is not one that is known"

    @classmethod
    def namespace(cls, stock: type) -> dict:
        """What the tuned class of `stock` has beside this class's own attributes."""
        return {}

    def __reduce_ex__(self, protocol):
        # The tuned class is made at run time: a pickle names what it is made of.
        whole = super().__reduce_ex__(max(protocol, 2))
        if not is_tuned(self):
            return whole
        return (rebuild, (self.stock, self.part, self.kind), *whole[2:])

    def extra_repr(self):
        return ", ".join(filter(None, (super().extra_repr(), "tuned")))


@cache
def tuned_class(stock: type, part: type, kind: str | None = None) -> type:
    """The subclass of `stock` whose forward is that of `part`, a Tuned."""
    namespace = {
        "__doc__": stock.__doc__,
        "__module__": part.__module__,
        "stock": stock,
        "part": part,
        "kind": kind,
        **part.namespace(stock),
    }
    return type(stock.__name__, (part, stock), namespace)


def is_tuned(module: torch.nn.Module) -> bool:
    """Whether its class is a tuned one itself, and not one that somebody made of it since."""
    return isinstance(module, Tuned) and "stock" in vars(type(module))


def rebuild(stock: type, part: type, kind: str | None) -> torch.nn.Module:
    """An empty module for unpickling and deepcopy: the stock one where its source has changed."""
    module = stock.__new__(stock)
    unknown = part.recognises(stock)
    if unknown:
        warnings.warn(f"tune: {unknown}: loaded as the stock part", stacklevel=2)
    else:
        module.__class__ = tuned_class(stock, part, kind)
    return module


@dataclass
class Part:
    """A row of the table for one module: what happens to it, and how."""

    name: str
    says: str  # the op that it becomes, or why it was left
    swap: Callable | None = None
    expected: bool = True  # that it was left needs no warning
    example: Callable | None = None  # () -> savings.Example


def left(module, says: str, *, expected: bool = False) -> Part:
    return Part(type(module).__name__, says, expected=expected)


def swapped(module, part: type, kind: str | None = None, example: Callable | None = None) -> Part:
    """The Part that puts `module` under the tuned class, or says why its source forbids it."""
    stock = type(module)
    unknown = part.recognises(stock)
    if unknown:
        return left(module, unknown)
    tuned = tuned_class(stock, part, kind)

    def swap():
        module.__class__ = tuned

    return Part(stock.__name__, part.op, swap, example=example and (lambda: example(module, tuned)))


def parts_of(owner: Owner, stock: type | None, name: str, decide: Callable) -> list[Part]:
    """`decide(module)` for each module of class `stock`; those that pass for one are left."""
    return [
        _part_of(module, stock, decide)
        for module in owner.modules
        if isinstance(module, stock or ()) or type(module).__name__ == name
    ]


def _part_of(module, stock, decide) -> Part:
    kind = type(module)
    if isinstance(module, Tuned):
        return left(module, ALREADY, expected=True)
    if kind is not stock:
        name = f"{kind.__module__}.{kind.__qualname__}"
        return left(module, f"its class is {name}, not the stock one")
    if "forward" in vars(module):
        return left(module, "its forward was replaced on the instance")
    return decide(module)
