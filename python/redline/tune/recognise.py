"""What is known of transformers, and how a class and its arithmetic are recognised.

A part is swapped when its class is the very class that transformers (or torch.nn) has for the model
type, and the source of what it computes has a known fingerprint. A numerical probe of the module
would see neither a branch that it does not take nor a rounding that it does not meet, would call
the user's hooks, and cannot run on meta or quantised weights. A source that a later transformers
changed, or that somebody patched, has another fingerprint: the part is left as it is.
"""

import ast
import hashlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from types import FunctionType, ModuleType

import torch

# model type: (folder of transformers.models, prefix of its classes)
MODELS = {
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3": ("gemma3", "Gemma3"),
    "gemma3_text": ("gemma3", "Gemma3"),
    "gpt2": ("gpt2", "GPT2"),
    "llama": ("llama", "Llama"),
    "mistral": ("mistral", "Mistral"),
    "olmo2": ("olmo2", "Olmo2"),
    "phi3": ("phi3", "Phi3"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
}
NOT_ARITHMETIC = {"annotation", "ctx", "kind", "returns", "type_comment", "type_params"}


@dataclass(frozen=True)
class Family:
    """Where the classes of one model type live."""

    module: ModuleType
    prefix: str

    def stock(self, suffix: str) -> type | None:
        return getattr(self.module, self.prefix + suffix, None)


@dataclass(frozen=True)
class Owner:
    """A transformers model and its modules, without those of a model inside it."""

    model: torch.nn.Module
    family: Family | None
    modules: tuple


def family_of(model: torch.nn.Module) -> Family | None:
    folder, prefix = MODELS.get(getattr(model.config, "model_type", None), (None, None))
    module = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
    return Family(module, prefix) if module else None


def owners(root: torch.nn.Module) -> list[Owner]:
    """The transformers models in `root`, outermost first; transformers is not imported for it."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    found, seen, stack = [], set(), [(root, None)]
    while stack:
        module, modules = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, transformers.PreTrainedModel):
            modules = []
            found.append((module, modules))
        if modules is not None:
            modules.append(module)
        stack.extend((child, modules) for child in reversed(list(module.children())))
    return [Owner(model, family_of(model), tuple(modules)) for model, modules in found]


def unwrapped(function):
    """The function under the decorators of torch and transformers; anyone else's stays on."""
    while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
        if function.__globals__["__name__"].split(".")[0] not in ("torch", "transformers"):
            break
        function = function.__wrapped__
    return function


def calls(function, name: str) -> bool:
    """Whether the code of a function, under those decorators, says `name`."""
    code = getattr(unwrapped(function), "__code__", None)
    return code is not None and name in code.co_names


@cache
def fingerprint(function) -> str:
    """12 hex digits of a function's source, without comments, docstring, annotations and layout.

    Empty where there is no source. `function` is taken as it is: a wrapper is not looked through.
    """
    if not isinstance(function, FunctionType):
        return ""
    try:
        source = inspect.getsource(function.__code__)
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(repr(_outline(tree)).encode()).hexdigest()[:12]


def _outline(node):
    """A syntax tree as tuples: Python's own dump of one differs between its versions."""
    if isinstance(node, list):
        return [_outline(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = [
        (name, _outline(value))
        for name, value in ast.iter_fields(node)
        if name not in NOT_ARITHMETIC and value is not None and value != []
    ]
    return type(node).__name__, fields


def unknown_source(functions: dict, known: tuple) -> str | None:
    """The first name in `known`, pairs (name, fingerprint), whose function has none of them."""
    for name in dict(known):
        if (name, fingerprint(functions.get(name))) not in known:
            return name
    return None
