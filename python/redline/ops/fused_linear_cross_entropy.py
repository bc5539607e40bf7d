"""A head's product and the cross entropy of its logits, which never stand in memory at once."""
# Over budget: parameters: the op's own signature.

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)
from redline.ops._loss_scale import as_tensor

_ops = torch.ops.redline


def fused_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    *,
    loss_scale: Tensor | float | None = None,
    main_grad: Tensor | None = None,
    accumulate: bool = True,
    dummy_grad: str = "none",
    tp_group: str | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), targets), a chunk of the logits at a time.

    x: [..., hidden]; weight: [vocabulary, hidden]; bias: [vocabulary]; one dtype, autocast's where
    it is on; targets: [...] int64 or int32. Returns float32 (float64 for float64): the mean or sum
    over the tokens whose target is not `ignore_index`, or with reduction "none" the targets' shape.
    The options of the loss are cross_entropy's.

    Backward computes the logits again, which makes four products, and is right under any upstream
    gradient. It keeps x, the weight, and three float32 per token (four with smoothing).
    `loss_scale` promises what the upstream gradient will be: a number, a scalar tensor (a gradient
    scaler's), or with reduction "none" also one per token. The gradients are then computed in
    forward, in three products, and kept until backward: the weight's in float32, or in its own
    dtype where it is summed over three chunks at most and `main_grad` is not given. Another
    upstream gradient rescales those of a mean or a sum; with "none" it is an error on CPU and NaN
    on CUDA, where nothing is read back. A product for a frozen x or weight is left out.

    main_grad, accumulate and dummy_grad send the weight's gradient where ops.linear's do, in
    backward alone. tp_group and sequence_parallel are refused: products over more ranks are not
    built. Sizes: docs/memory.md.

    >>> fused_linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    return _ops.fused_linear_cross_entropy(
        x,
        weight,
        targets,
        bias,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        logit_softcap,
        loss_scale=as_tensor(loss_scale, x),
        main_grad=main_grad,
        accumulate=accumulate,
        dummy_grad=dummy_grad,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
    )
