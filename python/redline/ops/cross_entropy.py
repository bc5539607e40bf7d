"""Cross entropy of logits and classes, with z-loss, label smoothing and a logit softcap."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)
from redline.ops._loss_scale import as_tensor

_ops = torch.ops.redline


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    *,
    inplace_backward: bool = False,
    loss_scale: Tensor | float | None = None,
    return_log_sum_exp: bool = False,
    return_predictions: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """lse - (1 - s) x[target] - s mean(x) + z_loss lse^2, with lse = log(sum(exp(x))).

    logits: [..., vocabulary], any floating dtype, read as they are under autocast too; targets:
    [...] int64 or int32. x is the logits, or ``logit_softcap * tanh(logits / logit_softcap)``; s is
    `label_smoothing`. Returns float32 (float64 for float64 logits): the mean or sum over the rows
    whose target is not `ignore_index`, or with reduction "none" the targets' shape. With
    `return_log_sum_exp` (loss, lse), both differentiable.

    `return_predictions` adds, behind these, what ``logits.argmax(-1)`` gives, int64, of equal
    logits the first: out of the read that the loss makes, which saves argmax's own. Ignored rows
    have one too and are then read. The softcap does not enter. On CUDA a row with a NaN or +inf may
    be read twice.

    A target out of range is an error on CPU and a NaN row on CUDA. Class weights and soft targets
    are not built. Keeps the logits and three float32 per row for backward (four with smoothing).
    `inplace_backward` writes the gradient over the logits, which must not be a leaf tensor nor be
    wanted by anyone else; under ``torch.compile`` it has no effect.

    `loss_scale` promises what the upstream gradient will be: a number, a scalar tensor (a gradient
    scaler's), or with reduction "none" also one per row. Forward then makes the gradient too, in
    one pass over the logits (with `inplace_backward` over them), keeps it alone, and backward gives
    it as it is. Another upstream gradient rescales that of a mean or a sum; with "none" it is an
    error on CPU and NaN on CUDA, where nothing is read back. Refused with `return_log_sum_exp`.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    arguments = logits, targets, reduction, ignore_index, label_smoothing, z_loss, logit_softcap
    options = {"inplace_backward": inplace_backward, "loss_scale": as_tensor(loss_scale, logits)}
    if return_predictions:
        options["with_log_sum_exp"] = return_log_sum_exp
        loss, log_sum_exp, predictions = _ops.cross_entropy_with_predictions(*arguments, **options)
        return (loss, log_sum_exp, predictions) if return_log_sum_exp else (loss, predictions)
    op = _ops.cross_entropy_with_log_sum_exp if return_log_sum_exp else _ops.cross_entropy
    return op(*arguments, **options)
