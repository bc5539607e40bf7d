"""Linear, and LayerNormLinear: a norm and the product that reads it."""

import math

import torch

from redline.layers.norm import InputNorm


class Linear(torch.nn.Linear):
    """y = x W^T + bias: torch.nn.Linear, under the name that Redline's products will have.

    >>> Linear(1024, 4096, bias=False)(torch.randn(2, 16, 1024)).shape
    torch.Size([2, 16, 4096])
    """


def reset_linear(weight, bias):
    """Fills weight [out, in] and bias [out] as torch.nn.Linear does, from the same numbers."""
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0
        torch.nn.init.uniform_(bias, -bound, bound)


class LayerNormLinear(InputNorm):
    """y = norm(x) W^T + bias; layer_norm_weight [in], weight [out, in], bias [out].

    forward(x) -> y; forward(x, residual) -> (y, x + residual), the sum and its norm in one pass.

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
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, normalization, eps, zero_centered, factory)
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = torch.nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        self.reset_norm()
        reset_linear(self.weight, self.bias)

    def forward(self, x, residual=None):
        normed, total = self.normalize(x, residual)
        y = torch.nn.functional.linear(normed, self.weight, self.bias)
        return y if residual is None else (y, total)
