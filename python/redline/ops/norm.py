"""RMSNorm and LayerNorm over the last axis, alone and behind bias, dropout and the residual."""

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    row_count: Tensor | None = None,
    return_amax: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, 2019).

    x: [..., cols]; weight: [cols], of x's dtype or float32, ``1 + weight`` with `zero_centered`.
    row_count: one int64 on x's device; rows from it on give zeros. Returns y of x's shape and
    dtype. Keeps x and one float32 per row for backward.

    `return_amax` adds what ``y.abs().amax(-1)`` gives, float32 (float64 for float64), without
    reading y again: the largest magnitude of each row, for a quantisation by row or, by its max(),
    by tensor. NaN where y has one; it has no gradient.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), epsilon=0.0, return_amax=True)
    (tensor([[0.8485, 1.1314]]), tensor([1.1314]))
    """
    if return_amax:
        y, _, amax = _ops.norm_with_amax(
            x, None, weight, None, "rms_norm", epsilon, zero_centered, row_count=row_count
        )
        return y, amax
    return _ops.rms_norm(x, weight, epsilon, zero_centered, row_count=row_count)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    row_count: Tensor | None = None,
    return_amax: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + epsilon) * weight + bias (Ba, Kiros and Hinton, 2016).

    Shapes and options as in `rms_norm`; bias: [cols]. Keeps x and two float32 per row.
    """
    if return_amax:
        y, _, amax = _ops.norm_with_amax(
            x, None, weight, bias, "layer_norm", epsilon, zero_centered, row_count=row_count
        )
        return y, amax
    return _ops.layer_norm(x, weight, bias, epsilon, zero_centered, row_count=row_count)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    row_count: Tensor | None = None,
    return_amax: bool = False,
) -> tuple[Tensor, ...]:
    """(rms_norm(x + residual), x + residual) in one pass over memory, and amax if it is asked for.

    residual: x's shape, x's dtype or float32; the sum has its dtype, y has x's. The sum is rounded
    first and the rounded sum is normalised, so y has the bits of ``rms_norm(x + residual)``.
    Keeps the sum and one float32 per row.
    """
    if return_amax:
        return _ops.norm_with_amax(
            x, residual, weight, None, "rms_norm", epsilon, zero_centered, row_count=row_count
        )
    return _ops.residual_rms_norm(x, residual, weight, epsilon, zero_centered, row_count=row_count)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    row_count: Tensor | None = None,
    return_amax: bool = False,
) -> tuple[Tensor, ...]:
    """(layer_norm(x + residual), x + residual) in one pass; as `residual_rms_norm`."""
    if return_amax:
        return _ops.norm_with_amax(
            x, residual, weight, bias, "layer_norm", epsilon, zero_centered, row_count=row_count
        )
    return _ops.residual_layer_norm(
        x, residual, weight, bias, epsilon, zero_centered, row_count=row_count
    )


def bias_dropout_residual_rms_norm(
    x: Tensor,
    input_bias: Tensor | None,
    residual: Tensor,
    probability: float,
    weight: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = residual + dropout(x + input_bias) in one pass over memory.

    s has the bits of ``bias_dropout_add(x, input_bias, residual, probability, training)`` from the
    same state of torch's generator, y those of ``rms_norm(s)``; the gradients likewise. No mask is
    kept: s, one float32 per row and two int64. Without training, or with probability 0, no number
    is drawn.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> bias_dropout_residual_rms_norm(x, None, x, 0.5, epsilon=0.0, training=False)
    (tensor([[0.8485, 1.1314]]), tensor([[6., 8.]]))
    """
    return _ops.bias_dropout_residual_rms_norm(
        x, input_bias, residual, probability, weight, epsilon, zero_centered, training=training
    )


def bias_dropout_residual_layer_norm(
    x: Tensor,
    input_bias: Tensor | None,
    residual: Tensor,
    probability: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    *,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = residual + dropout(x + input_bias) in one pass.

    As `bias_dropout_residual_rms_norm`; keeps two float32 per row.
    """
    return _ops.bias_dropout_residual_layer_norm(
        x,
        input_bias,
        residual,
        probability,
        weight,
        bias,
        epsilon,
        zero_centered,
        training=training,
    )
