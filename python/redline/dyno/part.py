"""What a part is to the dyno: two ways to compute one thing, and the least work it can cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"


class Unavailable(Exception):
    """Why a part cannot be measured, in one sentence."""


def tuned_name(module: str, name: str):
    """redline.<module>.<name>."""
    try:
        return getattr(import_module(f"redline.{module}"), name)
    except (AttributeError, ImportError) as error:
        cause = "" if isinstance(error, AttributeError) else f" ({error})"
        raise Unavailable(f"redline.{module}.{name} is not in this build{cause}") from None


def op(name: str) -> Callable:
    return tuned_name("ops", name)


@dataclass(frozen=True)
class Setting:
    """Where the parts run and how large they are."""

    device: torch.device
    dtype: torch.dtype
    rows: int = 4096
    cols: int = 1024
    vocabulary: int = 8192
    layer_hidden: int = 512
    layer_sequence: int = 256
    layer_batch: int = 4

    @classmethod
    def for_device(cls, device: torch.device, dtype: torch.dtype) -> Setting:
        if device.type != "cuda":
            return cls(device, dtype)
        sizes = {"rows": 8192, "cols": 4096, "vocabulary": 32768}
        layer = {"layer_hidden": 4096, "layer_sequence": 2048}
        return cls(device, dtype, **sizes, **layer)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def heads_shape(self) -> tuple[int, int, int, int]:
        """[batch, sequence, heads, head_dim] of rows x cols elements."""
        sequence = min(1024, self.rows)
        head_dim = 64 if self.cols < 4096 else 128
        return self.rows // sequence, sequence, self.cols // head_dim, head_dim

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """As `heads_shape`, with a quarter of the rows: attention is quadratic."""
        batch, sequence, heads, head_dim = self.heads_shape
        return max(batch // 4, 1), sequence, heads, head_dim


@dataclass(frozen=True)
class Cost:
    """The bytes that must move and the operations that must be done, whoever does it."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0


@dataclass
class Case:
    """A part made for one setting. stock(*inputs) and tuned(*inputs) give the same tensors."""

    shape: str
    inputs: Callable[[], tuple[Tensor, ...]]  # fresh random data each time
    stock: Callable
    tuned: Callable
    cost: Cost
    weights: tuple[int, ...] = ()  # which inputs are parameters
    differentiable: bool = True
    checked: dict[str, Callable] | None = None  # measured for the error in place of the calls
    errors: Callable[[dict[str, Callable]], dict[str, tuple[float, float]]] | None = None

    def living(self, call: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The tensors that live whether or not autograd keeps them."""
        module = isinstance(call, torch.nn.Module)
        owned = [*call.parameters(), *call.buffers()] if module else []
        return owned + [inputs[i] for i in self.weights]


@dataclass(frozen=True)
class Part:
    name: str
    make: Callable[[Setting], Case]
    compiled: bool = False  # whether torch.compile is measured too, while the limit lasts
    directions: tuple[str, ...] = (FORWARD, BOTH)
