"""The recipes of quantisation: values that describe one. Computing by one is refused where asked.

Megatron makes them from its configuration, compares their types and hands them to `autocast`.
"""

from enum import Enum
from typing import Any, ClassVar, NamedTuple


class Range(NamedTuple):
    """The largest values of a format, forward and backward."""

    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Float8 formats: E4M3 to 448, E5M2 to 57344; HYBRID is E4M3 forward and E5M2 backward."""

    E4M3 = Range(448.0, 448.0)
    E5M2 = Range(57344.0, 57344.0)
    HYBRID = Range(448.0, 57344.0)


class Recipe:
    """Keywords to attributes, over the class's defaults; unknown ones are kept too.

    Megatron gives delayed scaling keywords that no version of it has.
    """

    defaults: ClassVar[dict[str, Any]] = {"fp8_format": Format.HYBRID}

    def __init__(self, **options):
        self.__dict__.update(self.defaults | options)

    def __repr__(self):
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def mxfp8(self):
        return isinstance(self, MXFP8BlockScaling)

    def nvfp4(self):
        return isinstance(self, NVFP4BlockScaling)


class DelayedScaling(Recipe):
    """One scale per tensor, from the largest values of the steps before."""

    defaults: ClassVar[dict[str, Any]] = {
        "margin": 0,
        "fp8_format": Format.HYBRID,
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "reduce_amax": True,
        "fp8_dpa": False,
        "fp8_mha": False,
    }


class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own largest value."""


class Float8BlockScaling(Recipe):
    """A scale per 128 values of an activation and per 128 x 128 of a weight."""

    defaults: ClassVar[dict[str, Any]] = {"fp8_format": Format.E4M3}


class MXFP8BlockScaling(Recipe):
    """A power of two per 32 values."""

    defaults: ClassVar[dict[str, Any]] = {"fp8_format": Format.E4M3}


class NVFP4BlockScaling(Recipe):
    """Four bits, with a scale per 16 values and one per tensor."""

    defaults: ClassVar[dict[str, Any]] = {}


class CustomRecipe(Recipe):
    """A factory that gives the quantiser of each role."""

    def __init__(self, qfactory, **options):
        super().__init__(qfactory=qfactory, **options)
