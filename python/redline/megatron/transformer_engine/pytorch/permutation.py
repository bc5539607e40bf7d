"""Rows sorted by expert and back: those of `redline.extensions.transformer_engine`."""

from redline.extensions import transformer_engine as address

moe_permute = address.fused_permute
moe_permute_with_probs = address.fused_permute_with_probs
moe_permute_and_pad_with_probs = address.fused_permute_and_pad_with_probs
moe_unpermute = address.fused_unpermute
moe_sort_chunks_by_index = address.fused_sort_chunks_by_index
moe_sort_chunks_by_index_with_probs = address.fused_sort_chunks_by_index_with_probs
