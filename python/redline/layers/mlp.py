"""LayerNormMLP: norm, up projection, activation, down projection."""

import torch

from redline import ops
from redline.layers.linear import reset_linear
from redline.layers.norm import InputNorm

GATED = ("swiglu", "geglu", "reglu", "quick_geglu", "clamped_swiglu")
PLAIN = ("gelu", "gelu_erf", "quick_gelu", "silu", "relu", "squared_relu")


class LayerNormMLP(InputNorm):
    """y = act(norm(x) W1^T + b1) W2^T + b2; a gated fc1 has 2 ffn_hidden_size rows, gate first.

    forward(x) -> y; forward(x, residual) -> (y, x + residual), the sum and its norm in one pass.

    >>> LayerNormMLP(1024, 2816)(torch.randn(2, 16, 1024)).shape
    torch.Size([2, 16, 1024])
    """

    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        bias=True,
        *,
        normalization="RMSNorm",
        activation="swiglu",
        eps=1e-5,
        zero_centered=False,
        device=None,
        dtype=None,
    ):
        if activation not in GATED + PLAIN:
            expected = " ".join(GATED + PLAIN)
            raise ValueError(f"LayerNormMLP: activation: expected {expected}, not {activation}")
        factory = {"device": device, "dtype": dtype}
        super().__init__(hidden_size, normalization, eps, zero_centered, factory)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation = activation
        fc1_rows = ffn_hidden_size * (2 if activation in GATED else 1)
        self.fc1_weight = torch.nn.Parameter(torch.empty(fc1_rows, hidden_size, **factory))
        self.fc1_bias = torch.nn.Parameter(torch.empty(fc1_rows, **factory)) if bias else None
        self.fc2_weight = torch.nn.Parameter(torch.empty(hidden_size, ffn_hidden_size, **factory))
        self.fc2_bias = torch.nn.Parameter(torch.empty(hidden_size, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        self.reset_norm()
        reset_linear(self.fc1_weight, self.fc1_bias)
        reset_linear(self.fc2_weight, self.fc2_bias)

    def activate(self, x):
        """The activation of fc1's product, which adds fc1's bias in the same pass."""
        if self.activation in GATED:
            return ops.gated_activation(x, kind=self.activation, bias=self.fc1_bias)
        return ops.activation(x, self.fc1_bias, self.activation)

    def forward(self, x, residual=None):
        normed, total = self.normalize(x, residual)
        up = torch.nn.functional.linear(normed, self.fc1_weight)
        y = torch.nn.functional.linear(self.activate(up), self.fc2_weight, self.fc2_bias)
        return y if residual is None else (y, total)
