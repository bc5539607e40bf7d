"""What becomes of each part of a model, decided before anything is changed."""

import warnings

import torch

from redline.tune import activations, attention, cross_entropy, gated_mlps, norms, rotary
from redline.tune.recognise import MODELS, owners
from redline.tune.swap import Part, left

KINDS = (norms, gated_mlps, activations, rotary, attention, cross_entropy)


def plan(model: torch.nn.Module) -> list[Part]:
    """One Part for each module (and loss) that Redline has a say in."""
    found = owners(model)
    if not found:
        return [left(model, "no transformers model is in it")]
    parts, unknown = [], {}
    for owner in found:
        if owner.family is None:  # the outermost model speaks for those of its type inside it
            unknown.setdefault(owner.model.config.model_type, owner.model)
        else:
            parts.extend(part for kind in KINDS for part in kind.parts(owner))
    return parts + [_unknown(model, kind) for kind, model in unknown.items()]


def _unknown(model, kind) -> Part:
    return left(model, f"model type {kind} is unknown (known: {', '.join(MODELS)})")


def rows(parts: list[Part]) -> list[list[Part]]:
    """Parts that are alike, in order of appearance."""
    alike = {}
    for part in parts:
        alike.setdefault((part.name, part.says), []).append(part)
    return list(alike.values())


def warn(parts: list[Part]) -> None:
    """One warning for all that was left and should not have been."""
    unexpected = [part for part in parts if part.swap is None and not part.expected]
    lines = [f"tune: {part.name}: {part.says}: left as it is" for part, *_ in rows(unexpected)]
    if lines:
        warnings.warn("\n".join(lines), stacklevel=3)
