"""Products with a weight, and where the weight's gradient goes."""
# Over budget: parameters: the op's own signature.

import torch
from torch import Tensor

import redline._library  # noqa: F401  (registers the ops)
from redline.ops._options import weight_gradient

_ops = torch.ops.redline


class WeightGradientQueue:
    """Weight gradients that backward left to be computed later, first in, first out.

    A copy, or an unpickled one, is empty.
    """

    def __init__(self):
        self.queue = torch.classes.redline.WeightGradientQueue()

    def __len__(self) -> int:
        return self.queue.size()

    def pop(self) -> Tensor | None:
        """Computes the oldest gradient: into its main_grad, then None, or else returned.

        A RuntimeError where there is none.
        """
        return self.queue.pop()

    def clear(self) -> None:
        self.queue.clear()

    def __reduce__(self):
        return WeightGradientQueue, ()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    main_grad: Tensor | None = None,
    accumulate: bool = True,
    dummy_grad: str = "none",
    delayed: WeightGradientQueue | None = None,
    tp_group: str | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """x W^T + bias.

    x: [..., in]; weight: [out, in]; bias: [out]; one dtype, autocast's where it is on. Returns
    [..., out]. Keeps x where the weight is trained, the weight where x has a gradient.

    main_grad: a buffer [out, in] of any floating dtype; backward adds the weight's gradient to it,
    or writes it over what is there without `accumulate`, and gives autograd what `dummy_grad` says:
    nothing ("none"), or a tensor of the weight's shape, unwritten ("empty") or "zeros". Into a
    float32 buffer the gradient of 16-bit factors is never rounded to 16 bits.
    delayed: backward leaves the weight's gradient in this queue, for its pop(), and gives autograd
    nothing for it. tp_group and sequence_parallel are refused: products over more ranks are not
    built. Under ``torch.compile`` the graph breaks at a product with `delayed`; all else is traced.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    tensor([[3.5000]])
    """
    options = weight_gradient(main_grad, accumulate, dummy_grad, delayed)
    if tp_group is not None or sequence_parallel:
        options |= {"tp_group": tp_group, "sequence_parallel": sequence_parallel}
    return _ops.linear(x, weight, bias, **options)
