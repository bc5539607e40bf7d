"""Linear, and LayerNormLinear: a norm and the product that reads it."""
# Over budget: parameters: torch.nn.Linear's, and where the weight's gradient goes.

import math

import torch

from redline import ops
from redline.layers.norm import InputNorm
from redline.layers.parameters import parameter
from redline.layers.weight_gradient import WeightGradient


class Linear(WeightGradient, torch.nn.Linear):
    """y = x W^T + bias; weight [out, in], bias [out].

    accumulate_main_grad: backward adds the weight's gradient to the buffer weight.main_grad
    (float32 or the weight's dtype), in float32 without a rounding between, and gives weight.grad
    nothing; `first_microbatch` in forward overwrites the buffer. delay_weight_grad: backward leaves
    the product to backward_dw(), one call per backward, oldest first.

    >>> Linear(1024, 4096, bias=False)(torch.randn(2, 16, 1024)).shape
    torch.Size([2, 16, 4096])
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        accumulate_main_grad=False,
        delay_weight_grad=False,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_weight_gradient(accumulate_main_grad, delay_weight_grad)

    def forward(self, x, first_microbatch=None):
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        return self.product(x, weight, bias, first_microbatch)


def reset_linear(weight, bias):
    """Fills weight [out, in] and bias [out] as torch.nn.Linear does, from the same numbers."""
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0
        torch.nn.init.uniform_(bias, -bound, bound)


class LayerNormLinear(WeightGradient, InputNorm):
    """y = norm(x) W^T + bias; layer_norm_weight [in], weight [out, in], bias [out].

    forward(x) -> y; forward(x, residual) -> (y, x + residual), the sum and its norm in one pass, x
    dropped with the probability `dropout` first; norm(x) comes last with return_layernorm_output.
    Backward rebuilds norm(x), unless keep_normalized has it kept. The weight's gradient goes where
    `Linear`'s options of the same names say.

    >>> LayerNormLinear(1024, 3072)(torch.randn(2, 16, 1024)).shape
    torch.Size([2, 16, 3072])
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        normalization="RMSNorm",
        eps=1e-5,
        zero_centered=False,
        keep_normalized=False,
        return_layernorm_output=False,
        accumulate_main_grad=False,
        delay_weight_grad=False,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, normalization, eps, zero_centered, factory)
        self.in_features, self.out_features = in_features, out_features
        self.keep_normalized = keep_normalized
        self.return_layernorm_output = return_layernorm_output
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = torch.nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.set_weight_gradient(accumulate_main_grad, delay_weight_grad)
        self.reset_parameters()

    def reset_parameters(self):
        self.reset_norm()
        reset_linear(self.weight, self.bias)

    def forward(self, x, residual=None, first_microbatch=None, *, dropout=0.0):
        return self.norm_product(x, self.bias, residual, first_microbatch, dropout=dropout)

    def norm_product(self, x, bias, residual=None, first_microbatch=None, *, dropout=0.0):
        """forward with another bias than the layer's, or none."""
        weight = parameter(self, "weight")
        return ops.norm_linear(
            x,
            parameter(self, "layer_norm_weight"),
            self.layer_norm_bias,
            weight,
            bias,
            residual=residual,
            keep_normalized=self.keep_normalized,
            return_norm_output=self.return_layernorm_output,
            dropout=dropout,
            **self.norm_options(),
            **self.destination(weight, first_microbatch),
        )
