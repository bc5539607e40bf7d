# Over budget: parameters: the signature is Transformer Engine's.
"""LayerNorm, and the signature that it shares with RMSNorm."""

from redline.extensions.transformer_engine import norm
from redline.megatron.transformer_engine.pytorch.module.base import factory_of


class Signature:
    """Transformer Engine's arguments, mixed before one of the address's norms."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        *,
        device=None,
        dtype=None,
        sm_margin=0,
    ):
        if (normalized_shape is None) == (hidden_size is None):
            came = "neither" if hidden_size is None else "both"
            raise RuntimeError(
                f"transformer_engine.pytorch.{type(self).__name__}: normalized_shape: "
                f"expected it or hidden_size, not {came}"
            )
        shape = hidden_size if normalized_shape is None else normalized_shape
        factory = factory_of(device, dtype or params_dtype)
        super().__init__(shape, eps, zero_centered=zero_centered_gamma, **factory)
        if sequence_parallel is not None:
            for parameter in self.parameters(recurse=False):
                parameter.sequence_parallel = sequence_parallel


class LayerNorm(Signature, norm.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axes."""
