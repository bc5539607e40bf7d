"""A tensor cut along one dimension."""

import torch

from redline.extensions.transformer_engine.table import composed


@composed("torch.split")
def SplitAlongDim(tensor, dim, sizes, squeeze=False):
    """Views of tensor, of these sizes along dim; without that dimension where squeeze says so.

    sizes: a list, or one size for all.
    """
    parts = torch.split(tensor, sizes, dim=dim)
    return tuple(part.squeeze(dim) for part in parts) if squeeze else parts
