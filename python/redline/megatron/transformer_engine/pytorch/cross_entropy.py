"""Cross entropy of a vocabulary split over ranks: `redline.extensions.transformer_engine`'s."""

from redline.extensions.transformer_engine.cross_entropy import parallel_cross_entropy

__all__ = ["parallel_cross_entropy"]
