"""A head and its targets, as the tests of fused_linear_cross_entropy draw them."""

import pytest
import torch
import torch.nn.functional as F

import reference
from cases import DTYPES, randn, wide
from redline import ops

# Several chunks of the tokens and of the vocabulary in every dtype, the last ones short.
CHUNKED = {"cpu": (520, 8, 20001), "cuda": (600, 8, 60001)}
# Three equal chunks of the tokens in 16 bits: a promise sums the weight's gradient in them.
THREE = {"cpu": (2304, 8, 9001), "cuda": (1536, 8, 60001)}
OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_softcap": 5.0},
}

modes = pytest.mark.parametrize("promised", [False, True], ids=["recomputed", "promised"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def draw(case, dtype, device, with_bias=True):
    """[x, weight, bias], with logits of a size near two, and targets."""
    tokens, hidden, vocabulary = case
    scale = 2 / max(hidden, 1) ** 0.5
    tensors = [
        randn(tokens, hidden, dtype=dtype, device=device),
        randn(vocabulary, hidden, dtype=dtype, device=device, scale=scale, seed=1),
        randn(vocabulary, dtype=dtype, device=device, seed=2),
    ]
    generator = torch.Generator().manual_seed(tokens)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return tensors[: 3 if with_bias else 2], targets.to(device)


def leaves_of(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def call(leaves, targets, *arguments, **options):
    x, weight, *bias = leaves
    return ops.fused_linear_cross_entropy(
        x, weight, targets, *(bias or [None]), *arguments, **options
    )


def stock_of(tensors, targets, upstream, **options):
    """Stock's losses and gradients in the tensors' own dtype."""
    leaves = leaves_of(tensors)
    logits = F.linear(*leaves)
    losses = F.cross_entropy(logits.float(), targets, reduction="none", **options)
    return losses, torch.autograd.grad(losses, leaves, upstream)


def truth_of(tensors, targets, upstream, options):
    leaves = wide(*tensors)
    losses = reference.cross_entropy(reference.linear(*leaves), targets.cpu(), **options)
    return losses.detach(), torch.autograd.grad(losses, leaves, upstream.cpu().double())


PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "redline::gemm_out"}


def products(function):
    """The function's result, and how many products it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = function()
    return result, sum(event.name in PRODUCTS for event in profiler.events())
