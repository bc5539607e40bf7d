"""What the tests of cross_entropy draw, with a promised upstream gradient and without."""

import math

import torch

import reference
from cases import randn, wide
from redline import ops

OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_softcap": 5.0},
}


def draw(case, dtype, device, ignored=0, scale=3.0):
    generator = torch.Generator().manual_seed(case[0])
    targets = torch.randint(0, case[1], case[:1], generator=generator)
    targets[:ignored] = -100
    return randn(*case, dtype=dtype, device=device, scale=scale), targets.to(device)


def extreme(cols, first, dtype, device):
    """Nine rows with infinities, a NaN and the largest numbers; the first sees `first` on alone."""
    logits, targets = draw((9, cols), dtype, device)
    inf, largest = math.inf, torch.finfo(dtype).max
    logits[0, :first] = -inf
    logits[1, 5:] = -inf
    logits[2] = -inf
    logits[3, 7] = largest
    logits[4], logits[4, 3] = -largest, largest
    logits[5] = -largest
    logits[6, 100] = inf
    logits[7, cols - 1] = math.nan
    logits[8] += 2.0**11
    targets[:] = torch.tensor([cols - 20, 3, 0, 7, 3, 1, 0, 0, 9])
    return logits, targets


def gradcheck(reductions, **more):
    """Of every option, in float64 on the CPU."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    for reduction in reductions:
        for options in OPTIONS.values():
            given = options | more
            assert torch.autograd.gradcheck(
                lambda x, r=reduction, o=given: ops.cross_entropy(x, targets, r, **o), (logits,)
            )


def upstream_of(reduction, rows, device):
    return randn(*([rows] if reduction == "none" else []), dtype=torch.float32, device=device)


def call(logits, targets, *arguments, up, promise, **options):
    """The loss and its gradient under `up`, where `promise` was promised."""
    leaf = logits.detach().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, *arguments, loss_scale=promise, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, up)[0]


def truth_of(logits, targets, reduction, up, options):
    (leaf,) = wide(logits)
    targets = targets.cpu()
    kept = targets != -100
    losses = reference.cross_entropy(leaf, targets.clamp(min=0), **options)
    losses = torch.where(kept, losses, 0.0)
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / kept.sum()}[reduction]
    return loss.detach(), torch.autograd.grad(loss, leaf, up.cpu().double())[0]
