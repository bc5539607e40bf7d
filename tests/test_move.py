"""`redline move` rewrites old addresses, and nothing else, byte for byte."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redline import move
from redline.move import cpp, search

python = pytest.importorskip("redline.move.python", reason="needs libcst: pip install libcst")

R_OLD, R_NEW = "redline.transformer.custom_layers", "redline.extensions"
M_OLD, M_NEW = "megatron.core.transformer.custom_layers", "megatron.core.extensions"
OLD_ADDRESS = {R_OLD: R_NEW, M_OLD: M_NEW}


def plant(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- Python ---------------------------------------------------------------------------------------

# {a} is the package that a module lay in, and the one that it lies in now.
forms = [
    "import {a}.transformer_engine",
    "import os, {a}.transformer_engine as te, sys",
    "from {a}.transformer_engine import TENorm",
    "from {a}.transformer_engine import TENorm as N, TELinear",
    "from {a}.transformer_engine import (  # why\n        TENorm,  # a\n        TELinear as L,\n)",
    "from {a}.transformer_engine import (TENorm)",
    "from {a}.transformer_engine import *",
    "from {a} import transformer_engine",
    "from {a} import transformer_engine as te",
    "from   {a}.transformer_engine   import   TENorm",
    "from {a}.transformer_engine import \\\n        TENorm",
    "x = {a}.transformer_engine.TENorm(1, 2)",
    "x = ({a}.transformer_engine).TENorm",
    "del {a}.transformer_engine.TENorm.attribute",
    "te = importlib.import_module('{a}.transformer_engine')",
    'te = __import__("{a}.transformer_engine", fromlist=["TENorm"])',
    "spec = ModuleSpec(module=('{a}.transformer_engine', 'TENorm'))",
    'target = "{a}.transformer_engine.TENorm"',
    'entry = r"{a}.transformer_engine:TENorm"',
    'x: "Optional[{a}.transformer_engine.TENorm]" = None',
    "argv = ['--spec={a}.transformer_engine']",
    "name = f'{a}.transformer_engine.{{kind}}'",
    "name = '{a}.transformer_engine' '.TENorm'",
    '@patch("{a}.transformer_engine.TENorm")\n    def f(): pass',
]
# Redline's package moved as a whole; the name that the file binds stays.
package_forms = {
    "from redline.transformer import custom_layers": (
        "from redline import extensions as custom_layers"
    ),
    "from redline.transformer import custom_layers as cl": "from redline import extensions as cl",
    "import redline.transformer.custom_layers as cl": "import redline.extensions as cl",
    f"import {R_OLD}\n{R_OLD}.transformer_engine.X": (
        f"import {R_NEW}\n{R_NEW}.transformer_engine.X"
    ),
    "import megatron.core as mc\nmc.transformer.custom_layers.transformer_engine.X": (
        "import megatron.core as mc\nmc.extensions.transformer_engine.X"
    ),
    "from megatron import core\ncore.transformer.custom_layers.transformer_engine.X": (
        "from megatron import core\ncore.extensions.transformer_engine.X"
    ),
    "import_module('.transformer_engine', 'redline.transformer.custom_layers')": (
        "import_module('.transformer_engine', 'redline.extensions')"
    ),
    f"from {M_OLD} import transformer_engine as te, batch_invariant_kernels  # both\nx = 1": (
        f"from {M_OLD} import batch_invariant_kernels\n"
        f"from {M_NEW} import transformer_engine as te  # both\nx = 1"
    ),
    f"if a: from {M_OLD} import batch_invariant_kernels, transformer_engine": (
        f"if a: from {M_OLD} import batch_invariant_kernels; from {M_NEW} import transformer_engine"
    ),
    f'name = ("{M_OLD}."\n        "transformer_engine.TENorm")': (
        f'name = ("{M_NEW}.transformer_engine.TENorm")'
    ),
}
untouched = [
    f"from {M_OLD} import batch_invariant_kernels",
    f"import {M_OLD}.batch_invariant_kernels as kernels",
    f"# from {M_OLD}.transformer_engine import TENorm",
    f'"""Was in {M_OLD}.transformer_engine once."""',
    f"import {M_OLD}.transformer_engine_of_mine",
    f"x = my.{M_OLD}.transformer_engine",
    f"x = 'my.{M_OLD}.transformer_engine'",
    f"x = b'{M_OLD}.transformer_engine'",
    f"import {M_OLD}.transformer_engine  # redline move: stay",
    f"names = {{\n    '{R_OLD}': '{R_NEW}',  # redline move: stay\n}}",
    f"from {M_OLD}.transformer_engine import (\n    TENorm,  # redline move: stay\n)",
    "from . import custom_layers",
]


@pytest.mark.parametrize("form", forms)
@pytest.mark.parametrize("old", [R_OLD, M_OLD])
def test_a_form_is_moved(form, old):
    before = f"if True:\n    {form.format(a=old)}\n"
    assert python.moved(before) == f"if True:\n    {form.format(a=OLD_ADDRESS[old])}\n"
    assert search.in_python(before)


@pytest.mark.parametrize("before", package_forms)
def test_a_package_is_moved(before):
    assert python.moved(before) == package_forms[before]
    assert search.in_python(before)
    assert search.in_python(package_forms[before]) == []


@pytest.mark.parametrize("text", untouched)
def test_what_is_no_old_address_stays(text):
    assert python.moved(text) == text
    assert search.in_python(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "from megatron.core.transformer import custom_layers\ncustom_layers.transformer_engine.X",
        "from megatron.core import transformer as t\nt.custom_layers.transformer_engine.X",
        f"x = '{M_OLD}\\x2etransformer_engine.X'",
    ],
)
def test_what_is_reached_through_another_name_is_left_and_told(tmp_path, text):
    source = move.rewrite(plant(tmp_path, "a.py", text))
    assert source.after == text
    (use,) = source.by_hand
    assert use.replacement == f"{M_NEW}.transformer_engine.X"
    assert source.moved == []


@pytest.mark.parametrize(
    ("place", "before"),
    [
        ("transformer/a.py", "from .custom_layers.transformer_engine import X"),
        ("models/gpt/a.py", "from ...transformer.custom_layers.transformer_engine import X"),
        ("transformer/a.py", "from.custom_layers.transformer_engine import X"),
    ],
)
def test_a_relative_import_in_a_checkout_of_megatron_is_moved(tmp_path, place, before):
    source = move.rewrite(plant(tmp_path, f"megatron/core/{place}", before))
    assert source.after == f"from {M_NEW}.transformer_engine import X"
    assert source.by_hand == []


def programs(newlines=("\n", "\r\n")):
    """Programs of several forms, with the old addresses and with the new."""
    line = st.tuples(
        st.sampled_from([*forms, "x = 1  # custom_layers", "def g():\n        return 'a b'"]),
        st.sampled_from([R_OLD, M_OLD]),
        st.sampled_from(["if a:", "try:", "class A:", "for x in y:  # loop", "async def f():"]),
        st.sampled_from(["", "  # tail", "\t", " ;"]),
    )

    def rendered(lines, newline):
        texts = []
        for choose in (lambda old: old, OLD_ADDRESS.get):
            text = ""
            for form, old, head, tail in lines:
                end = "" if form.endswith("pass") or "return" in form else tail
                text += f"{head}\n    {form.format(a=choose(old))}{end}\n"
                text += "finally:\n\n    pass\n" if head == "try:" else ""
            texts.append(text.replace("\n", newline))
        return tuple(texts)

    return st.builds(rendered, st.lists(line, max_size=5), st.sampled_from(newlines))


@given(programs())
@settings(deadline=None, max_examples=50)
def test_a_program_is_moved_to_the_letter_and_once(texts):
    before, after = texts
    assert python.moved(before) == after
    assert python.moved(after) == after
    assert search.in_python(after) == []


@given(st.text())
@example("x = " + "(" * 5000 + ")" * 5000)
@example("not " * 1000 + "1")
@settings(deadline=None, max_examples=30)
def test_any_text_is_left_as_it_is_or_called_unreadable(text):
    with suppress(search.Unreadable):
        assert python.moved(text) == text


# --- C++ ------------------------------------------------------------------------------------------

C_OLD, C_NEW = "redline::transformer::custom_layers", "redline::extensions"
cpp_forms = {
    f'#include "{cpp.old_folder}transformer_engine.h"': (
        '#include "redline/extensions/transformer_engine.h"'
    ),
    f"  #  include <{cpp.old_folder}transformer_engine.h>  // why": (
        "  #  include <redline/extensions/transformer_engine.h>  // why"
    ),
    f'#include "../{cpp.old_folder}transformer_engine.h"': (
        '#include "../redline/extensions/transformer_engine.h"'
    ),
    f"namespace te = {C_OLD}::transformer_engine;": f"namespace te = {C_NEW}::transformer_engine;",
    f"using ::{C_OLD}::transformer_engine::X;": f"using ::{C_NEW}::transformer_engine::X;",
    "redline :: transformer\n  ::custom_layers::transformer_engine::TENorm n;": (
        "redline::extensions::transformer_engine::TENorm n;"
    ),
    f"int n = 1'000; {C_OLD}::transformer_engine::X x('\"');": (
        f"int n = 1'000; {C_NEW}::transformer_engine::X x('\"');"
    ),
}
cpp_untouched = [
    f"// {C_OLD}::transformer_engine",
    f"// a comment that goes on \\\n{C_OLD}::transformer_engine",
    f"/* {C_OLD}::x\n#include <{cpp.old_folder}x.h>\n*/",
    f'auto s = "{C_OLD}::x \\" {C_OLD}";',
    f'auto s = R"x(")" {C_OLD})x";',
    f"my::{C_OLD}::x y;",
    f"{C_OLD}_of_mine::x y;",
    f"my{C_OLD}::x y;",
    f'#include "my{cpp.old_folder}x.h"',
    f"{C_OLD}::transformer_engine::X x;  // redline move: stay",
]


@pytest.mark.parametrize("before", cpp_forms)
def test_a_form_of_cpp_is_moved(before):
    assert cpp.moved(before, set()) == cpp_forms[before]
    ((line, _, new),) = search.in_cpp(before)
    assert (line, new.split("::")[0].split("/")[0]) != (0, "")


@pytest.mark.parametrize("text", cpp_untouched)
def test_what_is_no_old_address_in_cpp_stays(text):
    assert cpp.moved(text, search.staying_lines(text)) == text
    assert search.in_cpp(text) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from([*cpp_forms, *cpp_untouched, "int x = f<a>('b');"])))
def test_cpp_is_moved_to_the_letter_and_once(lines):
    before = "\n".join(lines)
    after = "\n".join(cpp_forms.get(line, line) for line in lines)
    staying = search.staying_lines(before)
    assert cpp.moved(before, staying) == after
    assert cpp.moved(after, search.staying_lines(after)) == after


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"\n/* {C_OLD}", "the comment that begins in line 2 does not end"),
        (f'auto s = R"x({C_OLD})";', "the string that begins in line 1 does not end"),
    ],
)
def test_cpp_that_does_not_end_is_left_and_told(tmp_path, text, why):
    assert move.rewrite(plant(tmp_path, "a.cpp", text)).left == why
