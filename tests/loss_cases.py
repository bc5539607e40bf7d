"""Logits, targets and a promised upstream gradient, as the tests of `loss_scale` draw them."""

import torch

import reference
from cases import randn, wide
from redline import ops

OPTIONS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_softcap": 5.0},
}


def draw(case, dtype, device, ignored=0):
    generator = torch.Generator().manual_seed(case[0])
    targets = torch.randint(0, case[1], case[:1], generator=generator)
    targets[:ignored] = -100
    return randn(*case, dtype=dtype, device=device, scale=3.0), targets.to(device)


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
