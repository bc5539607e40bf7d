# Over budget: parameters: the signatures are Transformer Engine's.
"""Rows of tokens, copied to the experts that a routing map names and summed back.

Compositions: Redline's embedding gathers rows, and its backward sums them, in row order and in
float32, so that both directions are the same on every run.
"""

import torch

from redline import ops
from redline.extensions.transformer_engine.table import composed

MAP_TYPES = ("mask", "index")


class _SumRows(torch.autograd.Function):
    """out[t] = sum of the rows whose token is t; rows of the token `tokens` are left out."""

    @staticmethod
    def forward(ctx, rows, token_of_row, tokens):
        ctx.save_for_backward(token_of_row)
        ctx.tokens = tokens
        return torch.ops.redline.embedding_backward(rows, token_of_row, tokens + 1)[:tokens]

    @staticmethod
    def backward(ctx, grad):
        (token_of_row,) = ctx.saved_tensors
        return _gather_rows(grad, token_of_row, ctx.tokens), None, None


def _gather_rows(source, token_of_row, tokens):
    """source[token], and zeros for the rows of the token `tokens`."""
    rows = ops.embedding(token_of_row.clamp(max=max(tokens - 1, 0)), source)
    return rows.masked_fill((token_of_row == tokens)[:, None], 0)


def _exclusive(counts):
    return counts.cumsum(0) - counts


def _rows_by_expert(routed, rows):
    """(expert, token) of the first `rows` routed pairs, expert by expert, tokens in order."""
    tokens = routed.shape[0]
    order = torch.argsort(~routed.T.reshape(-1), stable=True)[:rows]
    return order // tokens, order % tokens


def _row_id_map(routed, rows):
    """int32 [T, 2 E + 1]: a token's rows, descending, from column E their experts, their count."""
    tokens, experts = routed.shape
    row = routed.T.reshape(-1).cumsum(0).view(experts, tokens).T - 1
    row = torch.where(routed & (row < rows), row, -1)
    row, expert = row.sort(dim=1, descending=True)
    expert = torch.where(row >= 0, expert, -1)
    count = (row >= 0).sum(1, keepdim=True)
    return torch.cat([row, expert, count], 1).int()


def _owners(row_id_map, rows, pad_offsets):
    """(token, expert) of each row, the token T where none is: _row_id_map the other way round."""
    tokens, experts = row_id_map.shape[0], row_id_map.shape[1] // 2
    row, expert = row_id_map[:, :experts].long(), row_id_map[:, experts : 2 * experts].long()
    routed, expert = row >= 0, expert.clamp(min=0)
    if pad_offsets is not None:
        row = row + pad_offsets.to(row.device, torch.long)[expert]
    # Pairs without a row write to one place behind the last: which of them wins does not matter.
    row = torch.where(routed, row, rows).reshape(-1)
    token = torch.arange(tokens, device=row.device)[:, None].expand(tokens, experts).reshape(-1)
    token_of_row = torch.full((rows + 1,), tokens, device=row.device).scatter(0, row, token)
    expert_of_row = torch.zeros(rows + 1, dtype=torch.long, device=row.device)
    return token_of_row[:rows], expert_of_row.scatter(0, row, expert.reshape(-1))[:rows]


def _check_map_type(name, map_type):
    if map_type not in MAP_TYPES:
        raise ValueError(f"{name}: map_type: expected mask or index, not {map_type}")


def _check_map(name, inp, routing_map):
    if routing_map.dim() != 2 or inp.dim() != 2 or routing_map.shape[0] != inp.shape[0]:
        raise ValueError(
            f"{name}: routing_map: expected [tokens, experts] beside inp {tuple(inp.shape)}, "
            f"not {tuple(routing_map.shape)}"
        )


def _permute_by_index(inp, indices, rows):
    """indices [T, k]; the map is int32 [k * T]: the row of each pair, -1 where it has none."""
    tokens, slots = indices.shape
    flat = indices.reshape(-1)
    order = torch.argsort(torch.where(flat < 0, torch.iinfo(flat.dtype).max, flat), stable=True)
    rows = rows if rows > 0 else flat.numel()
    row_of_pair = torch.empty_like(order).scatter(
        0, order, torch.arange(len(order), device=order.device)
    )
    row_of_pair = torch.where((row_of_pair < rows) & (flat >= 0), row_of_pair, -1)
    token_of_row = torch.where(flat[order[:rows]] < 0, tokens, order[:rows] // slots)
    row_id_map = row_of_pair.view(tokens, slots).T.reshape(-1).int()
    return _gather_rows(inp, token_of_row, tokens), row_id_map


@composed("torch's sort, `embedding`'s gather and its ordered sum")
def fused_permute(inp, routing_map, num_out_tokens=-1, max_token_num=-1, map_type="mask"):
    """(rows [num_out_tokens, H], row_id_map): each token's row once for each of its experts.

    inp [T, H]; routing_map [T, experts] bool, or with map_type "index" the experts' numbers [T, k].
    Rows are grouped by expert and inside one in the tokens' order; what num_out_tokens leaves no
    room for is dropped. Not given, it is counted, which waits for the device.
    """
    _check_map_type("fused_permute", map_type)
    _check_map("fused_permute", inp, routing_map)
    if map_type == "index":
        return _permute_by_index(inp, routing_map, int(num_out_tokens))
    routed = routing_map.bool()
    rows = _row_count(num_out_tokens, routed)
    token_of_row = _owned(routed, rows)[1]
    return _gather_rows(inp, token_of_row, inp.shape[0]), _row_id_map(routed, rows)


def _row_count(num_out_tokens, routed):
    """The number given, which may be a tensor's; None and what is not above 0 ask for a count."""
    rows = 0 if num_out_tokens is None else int(num_out_tokens)
    return rows if rows > 0 else int(routed.sum())


def _owned(routed, rows):
    """_rows_by_expert, with the token T in rows that more room than pairs leaves over."""
    expert, token = _rows_by_expert(routed, rows)
    inside = torch.arange(len(token), device=token.device) < routed.sum()
    token = torch.where(inside, token, routed.shape[0])
    missing = rows - len(token)
    token = torch.nn.functional.pad(token, (0, missing), value=routed.shape[0])
    return torch.nn.functional.pad(expert, (0, missing)), token


def _probabilities(probs, expert, token):
    """probs[token, expert] of each row; 0 where the token is none."""
    padded = torch.nn.functional.pad(probs, (0, 0, 0, 1))
    return padded.reshape(-1).gather(0, token * probs.shape[1] + expert)


@composed("torch's sort, `embedding`'s gather and its ordered sum")
def fused_permute_with_probs(inp, probs, routing_map, num_out_tokens=-1):
    """(rows, the rows' probabilities [num_out_tokens], row_id_map); probs [T, experts].

    A pair whose probability is exactly 0 gives a row of zeros.
    """
    _check_map("fused_permute_with_probs", inp, routing_map)
    routed = routing_map.bool()
    rows = _row_count(num_out_tokens, routed)
    expert, token = _owned(routed, rows)
    permuted = _probabilities(probs, expert, token)
    token = torch.where(permuted.detach() == 0, inp.shape[0], token)
    return _gather_rows(inp, token, inp.shape[0]), permuted, _row_id_map(routed, rows)


@composed("torch's sort, `embedding`'s gather and its ordered sum")
def fused_permute_and_pad_with_probs(inp, probs, routing_map, tokens_per_expert, align_size):
    """fused_permute_with_probs, each expert's rows filled up with zeros to a multiple.

    Returns (rows, their probabilities, row_id_map, pad_offsets, rows of each expert); pad_offsets
    [experts] is None where nothing was added. Waits for the device, which knows the size.
    """
    name = "fused_permute_and_pad_with_probs"
    _check_map(name, inp, routing_map)
    routed = routing_map.bool()
    counts = torch.as_tensor(tokens_per_expert, device=inp.device, dtype=torch.long)
    padded = (counts + align_size - 1) // align_size * align_size
    rows, padded_rows = int(counts.sum()), int(padded.sum())
    row_id_map = _row_id_map(routed, rows)
    pad_offsets = None if rows == padded_rows else _exclusive(padded - counts)
    token, expert = _owners(row_id_map, padded_rows, pad_offsets)
    permuted = _probabilities(probs, expert, token)
    token = torch.where(permuted.detach() == 0, inp.shape[0], token)
    out = _gather_rows(inp, token, inp.shape[0])
    return out, permuted, row_id_map, pad_offsets, padded


@composed("torch's sort, `embedding`'s gather and its ordered sum")
def fused_unpermute(
    inp,
    row_id_map,
    merging_probs=None,
    restore_shape=None,
    map_type="mask",
    probs=None,
    pad_offsets=None,
):
    """[T, H]: each token's rows summed in float32, times merging_probs [T, experts] where given.

    inp: the rows; row_id_map, map_type and pad_offsets: as fused_permute took and gave them (for
    "index" merging_probs is [T, k]). probs: the old name of merging_probs.
    """
    _check_map_type("fused_unpermute", map_type)
    merging_probs = probs if merging_probs is None else merging_probs
    rows = inp.shape[0]
    if map_type == "index":
        slots = 1 if merging_probs is None else merging_probs.shape[1]
        if merging_probs is None and restore_shape is not None:
            slots = row_id_map.numel() // restore_shape[0]
        pairs = row_id_map.view(slots, -1).T
        row_id_map = _index_map(pairs)
    token, expert = _owners(row_id_map, rows, pad_offsets)
    if merging_probs is None:
        out = _SumRows.apply(inp, token, row_id_map.shape[0])
    else:
        weighted = inp.float() * _probabilities(merging_probs, expert, token).float()[:, None]
        out = _SumRows.apply(weighted, token, row_id_map.shape[0]).to(inp.dtype)
    return out if restore_shape is None else out.view(*restore_shape[:-1], inp.shape[1])


def _index_map(pairs):
    """The map of "mask" of rows [T, k] by slot: a slot stands where an expert would."""
    slots = torch.arange(pairs.shape[1], device=pairs.device).expand_as(pairs)
    count = (pairs >= 0).sum(1, keepdim=True)
    return torch.cat([pairs, slots, count], 1)


def _chunk_order(rows, split_sizes, sorted_index):
    """The input row of each output row."""
    sizes = torch.as_tensor(split_sizes, device=sorted_index.device, dtype=torch.long)
    order = sorted_index.long()
    chunk = torch.repeat_interleave(
        torch.arange(len(order), device=order.device), sizes[order], output_size=rows
    )
    shift = _exclusive(sizes)[order] - _exclusive(sizes[order])
    return torch.arange(rows, device=order.device) + shift[chunk]


@composed("`embedding`'s gather and its ordered sum")
def fused_sort_chunks_by_index(inp, split_sizes, sorted_index):
    """The chunks of inp's rows, of split_sizes rows each, in the order that sorted_index names."""
    order = torch.as_tensor(sorted_index).to(inp.device)
    return ops.embedding(_chunk_order(inp.shape[0], split_sizes, order), inp)


@composed("`embedding`'s gather and its ordered sum")
def fused_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    """(fused_sort_chunks_by_index of inp, and of probs [rows])."""
    order = torch.as_tensor(sorted_index).to(inp.device)
    source = _chunk_order(inp.shape[0], split_sizes, order)
    return ops.embedding(source, inp), probs.gather(0, source)
