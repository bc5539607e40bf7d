"""The matrix product that Megatron calls by hand: `redline.extensions.transformer_engine`'s."""

from redline.extensions.transformer_engine.gemm import general_gemm

__all__ = ["general_gemm"]
