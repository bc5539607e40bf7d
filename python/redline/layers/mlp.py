"""LayerNormMLP: norm, up projection, activation, down projection."""

import torch

from redline import ops
from redline.layers.linear import reset_linear
from redline.layers.norm import InputNorm
from redline.layers.parameters import parameter
from redline.layers.weight_gradient import WeightGradient, add_gradient
from redline.ops.norm_linear import check_pre_activation_dtype

GATED = ("swiglu", "geglu", "reglu", "quick_geglu", "clamped_swiglu")
PLAIN = ("gelu", "gelu_erf", "quick_gelu", "silu", "relu", "squared_relu")


class LayerNormMLP(WeightGradient, InputNorm):
    """y = act(norm(x) W1^T + b1) W2^T + b2; a gated fc1 has 2 ffn_hidden_size rows, gate first.

    forward(x) -> y; forward(x, residual) -> (y, x + residual), the sum and its norm in one pass, x
    dropped with the probability `dropout` first.
    Kept for backward: x (or the sum), a number or two per row and fc1's product, nothing else.
    Both weights' gradients go where `Linear`'s options of the same names say.
    pre_activation_dtype: what fc1's product is kept in; None, as it is, is what is built.

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
        accumulate_main_grad=False,
        delay_weight_grad=False,
        pre_activation_dtype=None,
        device=None,
        dtype=None,
    ):
        if activation not in GATED + PLAIN:
            expected = " ".join(GATED + PLAIN)
            raise ValueError(f"LayerNormMLP: activation: expected {expected}, not {activation}")
        check_pre_activation_dtype("LayerNormMLP", pre_activation_dtype)
        factory = {"device": device, "dtype": dtype}
        super().__init__(hidden_size, normalization, eps, zero_centered, factory)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation = activation
        fc1_rows = ffn_hidden_size * (2 if activation in GATED else 1)
        self.fc1_weight = torch.nn.Parameter(torch.empty(fc1_rows, hidden_size, **factory))
        self.fc1_bias = torch.nn.Parameter(torch.empty(fc1_rows, **factory)) if bias else None
        self.fc2_weight = torch.nn.Parameter(torch.empty(hidden_size, ffn_hidden_size, **factory))
        self.fc2_bias = torch.nn.Parameter(torch.empty(hidden_size, **factory)) if bias else None
        self.set_weight_gradient(accumulate_main_grad, delay_weight_grad)
        self.fc1_delayed = ops.WeightGradientQueue() if delay_weight_grad else None
        self.reset_parameters()

    def reset_parameters(self):
        self.reset_norm()
        reset_linear(self.fc1_weight, self.fc1_bias)
        reset_linear(self.fc2_weight, self.fc2_bias)

    def forward(self, x, residual=None, first_microbatch=None, *, dropout=0.0):
        fc1_weight, fc2_weight = parameter(self, "fc1_weight"), parameter(self, "fc2_weight")
        options = self.norm_options()
        for name, weight, queue in (
            ("fc1", fc1_weight, self.fc1_delayed),
            ("fc2", fc2_weight, self.delayed),
        ):
            where = self.destination(weight, first_microbatch, queue, f"{name}_weight")
            options |= {f"{name}_{option}": value for option, value in where.items()}
        return ops.norm_mlp(
            x,
            parameter(self, "layer_norm_weight"),
            self.layer_norm_bias,
            fc1_weight,
            self.fc1_bias,
            fc2_weight,
            self.fc2_bias,
            residual=residual,
            activation=self.activation,
            dropout=dropout,
            **options,
        )

    def backward_dw(self):
        """The oldest weight gradients that backward left, into main_grad or weight.grad."""
        if self.delay_weight_grad:
            # Both wait in pairs. Where one product of a pair failed, the other is not done again.
            waiting = max(len(self.delayed), len(self.fc1_delayed))
            for weight, queue in (
                (self.fc2_weight, self.delayed),
                (self.fc1_weight, self.fc1_delayed),
            ):
                if len(queue) == waiting:
                    add_gradient(weight, queue.pop())
