"""The part of Transformer Engine that Megatron-Core uses, over Redline's layers and operators.

`redline.megatron.install()` puts it where ``import transformer_engine`` looks. What has no
counterpart here is absent, so that Megatron takes the path it has for that; what needs FP8 or FP4
is there and refuses.
"""

# Megatron reads it as a list of what is there. 2.13 asks for sinks, the largest logit, the router's
# functions and the offsets of padded permutation; from 2.14 on it asks for ops.GroupedLinear.
__version__ = "2.13.0"

from redline.megatron.transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch"]
