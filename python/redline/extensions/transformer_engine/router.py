# Over budget: parameters: the signatures are Transformer Engine's.
"""The mixture-of-experts router: scores, the experts chosen, the load-balancing loss.

Compositions of torch operations in float32. Of equal scores the lower expert wins, so that the map
is the same on every run and device.
"""

import torch

from redline.extensions.transformer_engine.refusals import refuse
from redline.extensions.transformer_engine.table import composed

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
_TINY = 1e-20


def _wide(name, logits):
    if logits.dtype == torch.float64:
        raise ValueError(f"{name}: logits: expected float32, bfloat16 or float16, not float64")
    return logits.float()


def _check_score_function(name, score_function):
    refuse(name, "score_function", score_function, SCORES)


def _score(x, score_function):
    if score_function == "sigmoid":
        return torch.sigmoid(x)
    return torch.nn.functional.softplus(x).sqrt()


def _limit_to_groups(scores, topk, num_groups, group_topk):
    """-inf for the experts outside of the group_topk groups of the largest sums of best scores."""
    grouped = scores.unflatten(-1, (num_groups, -1))
    best = grouped.sort(dim=-1, descending=True).values[..., : topk // group_topk].sum(-1)
    chosen = _top(best, group_topk)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def _top(scores, k):
    """The places of the k largest; a stable sort decides ties for the lower one."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _map_of(chosen, like):
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, chosen, True)


@composed(
    "torch, in float32; of equal scores the lower expert", "bitmaps, histograms, given experts"
)
def fused_topk_with_score_function(
    logits,
    topk,
    use_pre_softmax,
    num_groups,
    group_topk,
    scaling_factor,
    score_function,
    expert_bias,
    routing_map_format="bytemap",
    topk_indices=None,
    qb_histogram=None,
    qb_bin_bounds=None,
    qb_histogram_mode=None,
):
    """(probs [T, experts] of logits' dtype, routing_map bool [T, experts]).

    softmax: over all experts with use_pre_softmax, else over the chosen. sigmoid and sqrtsoftplus
    (sqrt(softplus(x))) are divided by their sum over the chosen where topk > 1. expert_bias
    [experts] is added for the choice alone. num_groups and group_topk: the choice is among the
    group_topk groups with the largest sums of their topk / group_topk best scores.
    """
    name = "fused_topk_with_score_function"
    _check_score_function(name, score_function)
    instead = "bytemap and chosen experts work"
    refuse(name, "routing_map_format", routing_map_format, ("bytemap",), instead)
    for option, value in (("topk_indices", topk_indices), ("qb_histogram", qb_histogram)):
        refuse(name, option, value, (None,), instead)
    if expert_bias is not None and score_function == "softmax":
        raise ValueError(f"{name}: expert_bias: expected sigmoid or sqrtsoftplus, not softmax")
    x = _wide(name, logits)
    if score_function == "softmax":
        scores = torch.softmax(x, -1) if use_pre_softmax else x
    else:
        scores = _score(x, score_function)
    selection = scores.detach() if expert_bias is None else scores.detach() + expert_bias.float()
    if num_groups and group_topk:
        selection = _limit_to_groups(selection, topk, num_groups, group_topk)
    chosen = _top(selection, topk)
    probs = scores.gather(-1, chosen)
    if score_function == "softmax" and not use_pre_softmax:
        probs = torch.softmax(probs, -1)
    elif score_function != "softmax" and topk > 1:
        probs = probs / (probs.sum(-1, keepdim=True) + _TINY)
    if scaling_factor:
        probs = probs * scaling_factor
    probs = torch.zeros_like(x).scatter(-1, chosen, probs).to(logits.dtype)
    return probs, _map_of(chosen, x)


@composed("torch, in float32", "bitmaps")
def fused_compute_score_for_moe_aux_loss(
    logits, topk, score_function, routing_map_format="bytemap"
):
    """(routing_map bool [T, experts], scores float32 [T, experts]) for the balancing loss.

    Scores: the softmax, or sigmoid or sqrtsoftplus divided by their sum over all experts. The map
    holds the topk largest.
    """
    name = "fused_compute_score_for_moe_aux_loss"
    _check_score_function(name, score_function)
    refuse(name, "routing_map_format", routing_map_format, ("bytemap",), "bytemap works")
    x = _wide(name, logits)
    if score_function == "softmax":
        scores = torch.softmax(x, -1)
    else:
        scores = _score(x, score_function)
        scores = scores / (scores.sum(-1, keepdim=True) + _TINY)
    return _map_of(_top(scores.detach(), topk), x), scores


@composed("torch, in float32, in a fixed order")
def fused_moe_aux_loss(probs, tokens_per_expert, total_num_tokens, num_experts, topk, coeff):
    """coeff experts / (topk T^2) sum_e n_e sum_t probs[t, e], a scalar (Fedus et al., 2021).

    probs [t, columns], columns a multiple of num_experts; tokens_per_expert (n) [columns];
    total_num_tokens (T): a number, or a scalar tensor on the device.
    """
    if probs.shape[1] % num_experts:
        raise ValueError(
            f"fused_moe_aux_loss: probs: expected a multiple of {num_experts} columns, "
            f"not {probs.shape[1]}"
        )
    total = total_num_tokens
    total = total.double() if isinstance(total, torch.Tensor) else float(total)
    weighted = (probs.float().sum(0) * tokens_per_expert).sum()
    return (weighted * (coeff * num_experts / topk / total**2)).to(probs.dtype)
