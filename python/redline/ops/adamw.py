"""One AdamW step over lists of tensors, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    learning_rate: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    clip_coefficient: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """t += 1; g = gradient * clip_coefficient / grad_scale; m += (1 - beta1) (g - m);
    v += (1 - beta2) (g^2 - v);
    p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + epsilon) + lr weight_decay p.

    Lists, an entry per parameter: gradients of any dtype; exp_avgs (m) and exp_avg_sqs (v) float32
    or bfloat16 (float64 for float64); masters float32 beside 16-bit parameters, or empty: then p is
    the master, and the parameter its rounding; steps (t) one float32 each. The rest are one-element
    tensors on the same device. Nothing is written where found_inf is not zero.
    `redline.optim.AdamW` keeps the lists.

    >>> p, g, m, v, t = (torch.tensor([x]) for x in (1.0, 0.5, 0.0, 0.0, 0.0))
    >>> adamw_step([p], [g], [m], [v], [], [t], learning_rate=torch.tensor(0.1), weight_decay=0.0)
    >>> p, t
    (tensor([0.9000]), tensor([1.]))
    """
    _ops.adamw_step(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        masters,
        steps,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        clip_coefficient=clip_coefficient,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
