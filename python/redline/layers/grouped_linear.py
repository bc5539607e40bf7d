# Over budget: parameters: the layer's sizes, and where the weights' gradients go.
"""GroupedLinear: a product for each block of rows, each with its own weight."""

import torch

from redline import ops
from redline.layers.linear import reset_linear
from redline.layers.weight_gradient import WeightGradient, add_gradient


class GroupedLinear(WeightGradient, torch.nn.Module):
    """y_i = x_i W_i^T + bias_i for the i-th block of x's rows; weight{i} [out, in], bias{i} [out].

    forward(x [rows, in], splits) -> [rows, out]; splits: rows of each block, zero allowed; one
    product per block. A tensor of splits on the device is read back. The weights' gradients go
    where `Linear`'s options of the same names say.

    >>> GroupedLinear(2, 8, 4)(torch.randn(5, 8), [3, 2]).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        groups,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        accumulate_main_grad=False,
        delay_weight_grad=False,
    ):
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.set_weight_gradient(accumulate_main_grad, delay_weight_grad)
        self.queues = [ops.WeightGradientQueue() for _ in range(groups * delay_weight_grad)]
        factory = {"device": device, "dtype": dtype}
        for index in range(groups):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, **factory))
            self.register_parameter(f"weight{index}", weight)
            added = torch.nn.Parameter(torch.empty(out_features, **factory)) if bias else None
            self.register_parameter(f"bias{index}", added)
        self.reset_parameters()

    def weights(self):
        return [getattr(self, f"weight{index}") for index in range(self.groups)]

    def biases(self):
        return [getattr(self, f"bias{index}") for index in range(self.groups)]

    def reset_parameters(self):
        for weight, bias in zip(self.weights(), self.biases(), strict=True):
            reset_linear(weight, bias)

    def products(self, x, splits, biases, first_microbatch=None):
        """One product per block, put together again."""
        splits = splits.tolist() if isinstance(splits, torch.Tensor) else list(splits)
        if len(splits) != self.groups or sum(splits) != x.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: splits: expected {self.groups} counts of {x.shape[0]} "
                f"rows, not {splits}"
            )
        queues = self.queues or [None] * self.groups
        each = zip(x.split(splits), self.weights(), biases, queues, strict=True)
        blocks = [self.product(*block[:3], first_microbatch, block[3]) for block in each]
        return torch.cat(blocks)

    def forward(self, x, splits, first_microbatch=None):
        return self.products(x, splits, self.biases(), first_microbatch)

    def backward_dw(self):
        """The oldest gradient of every weight that backward left."""
        for weight, queue in zip(self.weights(), self.queues, strict=False):
            add_gradient(weight, queue.pop())
