"""TENorm and TEFusedResidualRMSNorm."""

import torch

from redline import layers
from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.extensions.transformer_engine.module import factory_of, option
from redline.extensions.transformer_engine.refusals import check, refuse
from redline.extensions.transformer_engine.table import works


class _WeightDType(ExtraState):
    """Transformer Engine's rule for norms: compute on, and return, the weight's dtype."""

    returns_residual = False

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))

    @property
    def zero_centered_gamma(self):
        return self.zero_centered


class RMSNorm(_WeightDType, layers.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight, of the weight's dtype."""


class LayerNorm(_WeightDType, layers.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, of the weight's dtype."""


class _NormAndInput(torch.autograd.Function):
    """(rms_norm(x), x); backward adds x's own gradient in the norm's pass, before its rounding."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, zero_centered):
        op = torch.ops.redline.rms_norm_forward
        y, _, inverse_rms = op(x, None, weight, epsilon, zero_centered, None)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.zero_centered = zero_centered
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, y_grad, x_grad):
        if y_grad is None:
            return x_grad, None, None, None
        x, weight, inverse_rms = ctx.saved_tensors
        options = (ctx.zero_centered, None, ctx.needs_input_grad[1])
        op = torch.ops.redline.rms_norm_backward
        total, weight_grad = op(y_grad, x, weight, inverse_rms, x_grad, *options)
        return total, weight_grad if ctx.needs_input_grad[1] else None, None, None


@works("`rms_norm`, whose backward adds the residual's gradient in its own pass")
class TEFusedResidualRMSNorm(RMSNorm):
    """forward(x) -> (RMSNorm of x, x), for a block that adds x again behind the norm."""

    returns_residual = True

    def forward(self, x):
        if x.dtype != self.weight.dtype:  # a wider residual stream stays as it is
            return super().forward(x), x
        return _NormAndInput.apply(x, self.weight, self.epsilon(x), self.zero_centered)


@works("`rms_norm`, `layer_norm`")
class TENorm:
    """TENorm(config, hidden_size) -> the RMSNorm or LayerNorm that config.normalization names.

    With config.fused_residual_rmsnorm and has_residual: TEFusedResidualRMSNorm.

    >>> TENorm(config, hidden_size=4096)(x).shape == x.shape
    True
    """

    def __new__(cls, config, hidden_size, eps=1e-5, has_residual=False):
        check("TENorm", config)
        kinds = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
        refuse("TENorm", "normalization", config.normalization, tuple(kinds))
        kind = kinds[config.normalization]
        if has_residual and option(config, "fused_residual_rmsnorm", False):
            refuse("TENorm", "normalization", config.normalization, ("RMSNorm",))
            kind = TEFusedResidualRMSNorm
        zero_centered = option(config, "layernorm_zero_centered_gamma", False)
        norm = kind(hidden_size, eps, zero_centered=zero_centered, **factory_of(config))
        for parameter in norm.parameters():
            parameter.sequence_parallel = option(config, "sequence_parallel", False)
        return norm
