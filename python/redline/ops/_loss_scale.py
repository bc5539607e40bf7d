"""The promised upstream gradient of a loss, as its op takes it."""

import torch
from torch import Tensor


def as_tensor(loss_scale: Tensor | float | None, like: Tensor) -> Tensor | None:
    """A number becomes a scalar of the loss's dtype on the device of `like`."""
    if loss_scale is None or isinstance(loss_scale, Tensor):
        return loss_scale
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), loss_scale, dtype=dtype, device=like.device)
