"""Where a layer's products meet other ranks: the one seam for tensor and sequence parallelism.

Groups are torch.distributed process groups, or None. One rank is complete: nothing is sent. More
are refused here, so that no layer has to ask.
"""

import torch

__all__ = ["column_input", "one_rank", "row_output", "size_of"]


def size_of(group) -> int:
    """How many ranks a group holds; None, and a program without ranks, count as one."""
    if group is None or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(group)


def one_rank(layer, group, size=1):
    """Raises NotImplementedError where the group, or the configured size, is more than one."""
    size = max(size, size_of(group))
    if size > 1:
        raise NotImplementedError(
            f"{layer}: tp_group: expected one rank, not {size}: tensor and sequence parallel over "
            "more ranks are not built; data parallel works"
        )


def column_input(x, group, sequence_parallel, layer="column_input"):
    """What a column parallel product reads: x of every rank along the first axis."""
    one_rank(layer, group)
    return x


def row_output(y, group, sequence_parallel, layer="row_output"):
    """What a row parallel product gives: the sum over ranks, or its part along the first axis."""
    one_rank(layer, group)
    return y
