"""What does not depend on the framework: the recipes of quantisation."""

from redline.megatron.transformer_engine.common import recipe

__all__ = ["recipe"]
