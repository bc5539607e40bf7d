"""RMSNorm."""

from redline.extensions.transformer_engine import norm
from redline.megatron.transformer_engine.pytorch.module.layernorm import Signature


class RMSNorm(Signature, norm.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axes."""
