"""The schemas of a release only grow, by keyword arguments with defaults."""

import inspect
from pathlib import Path

import pytest
import torch

import redline.ops

SCHEMAS = Path(__file__).with_name("schemas.txt")


def schemas():
    """Each op of the library by name."""
    found = torch._C._jit_get_all_schemas()
    return {s.name: s for s in found if s.name.startswith("redline::")}


def described(argument):
    default = argument.default_value if argument.has_default_value() else "none at all"
    alias = argument.alias_info and (argument.alias_info.is_write, argument.alias_info.before_set)
    return argument.name, str(argument.type), str(default), alias, argument.kwarg_only


def growth(old, new):
    """What breaks for a caller of `old` that meets `new`, or nothing."""
    before, after = ([described(a) for a in schema.arguments] for schema in (old, new))
    for argument in before:
        if argument not in after:
            return f"argument {argument[0]} was taken away or changed"
    by_place = [a for a in after if not a[-1]]
    if by_place != [a for a in before if not a[-1]]:
        return "the arguments by place were changed"
    for argument in new.arguments:
        if described(argument) not in before and not argument.has_default_value():
            return f"argument {argument.name} has no default"
    if [str(r.type) for r in old.returns] != [str(r.type) for r in new.returns]:
        return "the results were changed"
    return None


def test_schemas_only_grow():
    written = [torch._C.parse_schema(line) for line in SCHEMAS.read_text().splitlines()]
    now = schemas()
    for old in written:
        assert old.name in now, f"{old.name} is gone"
        assert (seen := growth(old, now[old.name])) is None, f"{old.name}: {seen}"
    unwritten = [str(now[name]) for name in sorted(now.keys() - {old.name for old in written})]
    assert not unwritten, f"{SCHEMAS.name} lacks " + "\n".join(unwritten)


@pytest.mark.parametrize("name", ["attention", "linear", "norm_linear", "norm_mlp"])
def test_an_unsaid_option_is_the_functions_own(name):
    """These functions give their op what is not the default, which must be the same in both."""
    function = inspect.signature(getattr(redline.ops, name)).parameters
    arguments = [a for a in schemas()[f"redline::{name}"].arguments if a.has_default_value()]
    assert len(arguments) > 5
    for argument in arguments:
        assert function[argument.name].default == argument.default_value, argument.name


def test_growth_is_seen():
    old = torch._C.parse_schema("redline::op(Tensor x, float e=1.) -> Tensor")
    grown = {
        "redline::op(Tensor x, float e=1., *, int? k=None) -> Tensor": None,
        "redline::op(Tensor x, float e=2.) -> Tensor": "argument e was taken away or changed",
        "redline::op(Tensor x) -> Tensor": "argument e was taken away or changed",
        "redline::op(Tensor x, float e=1., int k=1) -> Tensor": "the arguments by place",
        "redline::op(float e=1., Tensor? x=None) -> Tensor": "argument x was taken away",
        "redline::op(Tensor x, float e=1., *, int k) -> Tensor": "argument k has no default",
        "redline::op(Tensor x, float e=1.) -> (Tensor, Tensor)": "the results were changed",
    }
    for text, expected in grown.items():
        seen = growth(old, torch._C.parse_schema(text))
        assert seen is None if expected is None else seen.startswith(expected), text
