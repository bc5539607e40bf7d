"""The old address: a notice of the move and a forward, nothing else."""

import warnings

from redline.extensions import transformer_engine as _address
from redline.extensions.transformer_engine import *  # noqa: F403

warnings.warn(
    "redline.transformer.custom_layers.transformer_engine has moved to "
    "redline.extensions.transformer_engine: import from there",
    DeprecationWarning,
    stacklevel=2,
)


def __getattr__(name):
    return getattr(_address, name)
