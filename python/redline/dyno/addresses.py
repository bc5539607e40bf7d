"""One part through the new address and through the old: the warning as printed, the bits."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import torch

OLD = "redline.transformer.custom_layers.transformer_engine"


@dataclass
class Addresses:
    warning: str | None = None
    same_bits: bool | None = None
    reason: str | None = None  # why nothing could be compared


def compare(device: torch.device, dtype: torch.dtype) -> Addresses:
    try:
        from redline.extensions.transformer_engine import TENorm as NewNorm

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sys.modules.pop(OLD, None)  # the notice comes with the first import
            from redline.transformer.custom_layers.transformer_engine import TENorm as OldNorm
        results = [_normed(norm, device, dtype) for norm in (NewNorm, OldNorm)]
    except ImportError as error:
        return Addresses(reason=f"not compared, because {error}")
    notices = [w for w in caught if issubclass(w.category, DeprecationWarning)]
    printed = _as_printed(notices[0]) if notices else None
    return Addresses(printed, all(torch.equal(a, b) for a, b in zip(*results, strict=True)))


def _as_printed(notice: warnings.WarningMessage) -> str:
    """What Python would have written to stderr."""
    text = warnings.formatwarning(
        notice.message, notice.category, notice.filename, notice.lineno, notice.line
    )
    return text.rstrip()


def _normed(make, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """TENorm's output and input gradient for a fixed input."""
    config = SimpleNamespace(
        normalization="RMSNorm", params_dtype=dtype, use_cpu_initialization=device.type == "cpu"
    )
    norm = make(config, 64, eps=1e-5).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, generator=generator).to(device, dtype).requires_grad_(True)
    y = norm(x)
    y.sum().backward()
    return y.detach(), x.grad
