"""The functions of Transformer Engine's extension module that Megatron calls by name."""

import torch


def thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank):
    """int32 indices of the packed tokens that a rank of a context-parallel group holds.

    Each sequence, of a length that 2 world_size divides, is cut into that many chunks; a rank holds
    the chunks rank and 2 world_size - 1 - rank.

    >>> thd_get_partitioned_indices(torch.tensor([0, 8]), 8, 2, 0)
    tensor([0, 1, 6, 7], dtype=torch.int32)
    """
    bounds = cu_seqlens.long()
    token = torch.arange(total_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    chunk_length = torch.diff(bounds)[sequence] // (2 * world_size)
    chunk = (token - bounds[sequence]) // chunk_length
    held = (chunk == rank) | (chunk == 2 * world_size - 1 - rank)
    return token[held].int()
