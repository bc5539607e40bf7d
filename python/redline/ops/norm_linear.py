"""A norm and the product that reads it, and a whole MLP behind its norm: one node each."""
# Over budget: parameters: the ops' own signatures.

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)
from redline.ops._options import norm_kind, stated, weight_gradient
from redline.ops.linear import WeightGradientQueue

_ops = torch.ops.redline


def _given(outputs: tuple[Tensor | None, ...]):
    """The first output, and behind it those of the others that there are."""
    if outputs[1] is None and outputs[-1] is None:
        return outputs[0]
    return tuple([output for output in outputs if output is not None])


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str = "rms_norm",
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    keep_normalized: bool = False,
    return_norm_output: bool = False,
    main_grad: Tensor | None = None,
    accumulate: bool = True,
    dummy_grad: str = "none",
    delayed: WeightGradientQueue | None = None,
    tp_group: str | None = None,
    sequence_parallel: bool = False,
    dropout: float = 0.0,
) -> Tensor | tuple[Tensor, ...]:
    """norm(x) W^T + bias as one node, with the bits of `rms_norm` or `layer_norm`, then `linear`.

    x: [..., in]; norm_weight, norm_bias: [in], of x's dtype or float32; weight: [out, in] and bias:
    [out], of x's dtype, or of 16 bits beside a float32 x. residual: added to x first, as in
    `residual_rms_norm`; behind dropout with that probability, where it is not 0, as in
    `bias_dropout_residual_rms_norm`. Returns y: [..., out]; behind it the sum, with a residual;
    behind them norm(x), with `return_norm_output`.

    Keeps x (or the sum) and one float32 per row (layer_norm: two); backward rebuilds norm(x) from
    them in one pass, unless `keep_normalized` keeps it too. What is frozen costs no product.
    main_grad, accumulate, dummy_grad, delayed, tp_group, sequence_parallel: `linear`'s.

    >>> norm_linear(torch.tensor([[3.0, 4.0]]), None, None, torch.eye(2), epsilon=0.0)
    tensor([[0.8485, 1.1314]])
    """
    return _given(
        _ops.norm_linear(
            x,
            norm_weight,
            norm_bias,
            weight,
            bias,
            **norm_kind(norm, epsilon),
            **stated(
                residual=residual,
                zero_centered=zero_centered,
                keep_normalized=keep_normalized,
                return_norm_output=return_norm_output,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
                dropout=dropout or None,
            ),
            **weight_gradient(main_grad, accumulate, dummy_grad, delayed),
        )
    )


def check_pre_activation_dtype(op: str, dtype: torch.dtype | None) -> None:
    """Refuses what is not built."""
    if dtype is not None:
        raise ValueError(
            f"{op}: pre_activation_dtype: expected None, not {dtype}; keeping the pre-activation "
            "in another dtype is not built yet"
        )


def norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str = "rms_norm",
    epsilon: float = 1e-5,
    zero_centered: bool = False,
    activation: str = "swiglu",
    fc1_main_grad: Tensor | None = None,
    fc1_accumulate: bool = True,
    fc1_dummy_grad: str = "none",
    fc1_delayed: WeightGradientQueue | None = None,
    fc2_main_grad: Tensor | None = None,
    fc2_accumulate: bool = True,
    fc2_dummy_grad: str = "none",
    fc2_delayed: WeightGradientQueue | None = None,
    tp_group: str | None = None,
    sequence_parallel: bool = False,
    dropout: float = 0.0,
    pre_activation_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(norm(x) W1^T + b1) W2^T + b2 as one node, with the bits of the ops one by one.

    x, the norm's tensors and dropout: `norm_linear`'s; activation: a kind of `activation` or of
    `gated_activation`; fc1_weight: [ffn, in], of a gated one [gate; linear]: [2 ffn, in]; fc1_bias:
    added within the activation; fc2_weight: [out, ffn]. The weights' options are `linear`'s.
    Returns y: [..., out], or (y, sum) with a residual. Keeps x (or the sum), one float32
    per row (layer_norm: two) and fc1's product, nothing else; backward rebuilds norm(x) in one
    pass, the activation's output in that of its gradient. pre_activation_dtype: what fc1's product
    is kept in; None, as it is, is what is built.

    >>> norm_mlp(torch.ones(1, 2), None, None, torch.eye(2), None, torch.eye(2), activation="relu")
    tensor([[1.0000, 1.0000]])
    """
    check_pre_activation_dtype("norm_mlp", pre_activation_dtype)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _given(
        _ops.norm_mlp(
            *tensors,
            activation=activation,
            **norm_kind(norm, epsilon),
            **stated(
                residual=residual,
                zero_centered=zero_centered,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
                dropout=dropout or None,
            ),
            **weight_gradient(fc1_main_grad, fc1_accumulate, fc1_dummy_grad, fc1_delayed, "fc1_"),
            **weight_gradient(fc2_main_grad, fc2_accumulate, fc2_dummy_grad, fc2_delayed, "fc2_"),
        )
    )
