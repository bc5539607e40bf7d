"""RMSNorm and LayerNorm, and the input norm that opens the fused layers."""
# Over budget: parameters: LayerNorm takes torch.nn.LayerNorm's.

import torch

from redline import ops

KINDS = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}  # in the ops' words


def _flatten(x, shape):
    # The ops normalise the last axis; torch's normalized_shape may span several.
    if len(shape) == 1 or x is None:
        return x
    if x.shape[-len(shape) :] != shape:
        raise RuntimeError(f"norm: x: expected trailing shape {shape}, not {tuple(x.shape)}")
    return x.flatten(-len(shape))


def _unflatten(y, shape):
    return y if len(shape) == 1 else y.unflatten(-1, shape)


def refuse_dropout(op, dropout):
    if dropout:
        raise RuntimeError(f"{op}: dropout: expected 0 without a residual, not {dropout}")


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axes; weight [normalized_shape].

    forward(x) -> y; forward(x, residual) -> (norm(x + residual), x + residual) in one pass, x
    dropped with the probability `dropout` first. `zero_centered` stores weight - 1, so that weight
    decay pulls towards the identity.

    >>> RMSNorm(4096)(torch.randn(2, 16, 4096)).shape
    torch.Size([2, 16, 4096])
    """

    def __init__(
        self,
        normalized_shape,
        eps=None,
        elementwise_affine=True,
        device=None,
        dtype=None,
        *,
        zero_centered=False,
    ):
        self.zero_centered = zero_centered  # before super: reset_parameters reads it
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self):
        super().reset_parameters()
        if self.zero_centered and self.elementwise_affine:
            torch.nn.init.zeros_(self.weight)

    def epsilon(self, x):
        if self.eps is not None:
            return self.eps
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps

    def forward(self, x, residual=None, *, dropout=0.0):
        shape = self.normalized_shape
        options = (_flatten(self.weight, shape), self.epsilon(x), self.zero_centered)
        if residual is None:
            refuse_dropout("rms_norm", dropout)
            return _unflatten(ops.rms_norm(_flatten(x, shape), *options), shape)
        rows, residual = _flatten(x, shape), _flatten(residual, shape)
        if dropout:
            y, total = ops.bias_dropout_residual_rms_norm(rows, None, residual, dropout, *options)
        else:
            y, total = ops.residual_rms_norm(rows, residual, *options)
        return _unflatten(y, shape), _unflatten(total, shape)


class LayerNorm(torch.nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axes.

    forward(x) -> y; forward(x, residual) -> (norm(x + residual), x + residual) in one pass, x
    dropped with the probability `dropout` first.

    >>> LayerNorm(4096, bias=False)(torch.randn(2, 16, 4096)).shape
    torch.Size([2, 16, 4096])
    """

    def __init__(
        self,
        normalized_shape,
        eps=1e-5,
        elementwise_affine=True,
        bias=True,
        device=None,
        dtype=None,
        *,
        zero_centered=False,
    ):
        self.zero_centered = zero_centered  # before super: reset_parameters reads it
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self):
        super().reset_parameters()
        if self.zero_centered and self.elementwise_affine:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x, residual=None, *, dropout=0.0):
        shape = self.normalized_shape
        weight, bias = _flatten(self.weight, shape), _flatten(self.bias, shape)
        options = (weight, bias, self.eps, self.zero_centered)
        if residual is None:
            refuse_dropout("layer_norm", dropout)
            return _unflatten(ops.layer_norm(_flatten(x, shape), *options), shape)
        rows, residual = _flatten(x, shape), _flatten(residual, shape)
        if dropout:
            y, total = ops.bias_dropout_residual_layer_norm(rows, None, residual, dropout, *options)
        else:
            y, total = ops.residual_layer_norm(rows, residual, *options)
        return _unflatten(y, shape), _unflatten(total, shape)


class InputNorm(torch.nn.Module):
    """The norm that opens LayerNormLinear and LayerNormMLP, in Transformer Engine's names."""

    def __init__(self, features, normalization, eps, zero_centered, factory):
        super().__init__()
        if normalization not in KINDS:
            raise ValueError(
                f"{type(self).__name__}: normalization: "
                f"expected RMSNorm or LayerNorm, not {normalization}"
            )
        self.normalization, self.eps, self.zero_centered = (
            normalization,
            eps,
            zero_centered,
        )
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(features, **factory))
        bias = torch.empty(features, **factory) if normalization == "LayerNorm" else None
        self.layer_norm_bias = None if bias is None else torch.nn.Parameter(bias)

    def reset_norm(self):
        torch.nn.init.constant_(self.layer_norm_weight, 0.0 if self.zero_centered else 1.0)
        if self.layer_norm_bias is not None:
            torch.nn.init.zeros_(self.layer_norm_bias)

    def norm_options(self):
        """norm_linear's and norm_mlp's, which say what norm."""
        kind = KINDS[self.normalization]
        return {"norm": kind, "epsilon": self.eps, "zero_centered": self.zero_centered}
