"""Activations that wait in the CPU's memory: `redline.extensions.transformer_engine`'s."""

from redline.extensions.transformer_engine.offload import get_cpu_offload_context

__all__ = ["get_cpu_offload_context"]

CPUOffloadEnabled = False  # Megatron's finer offloading sets it; nothing here reads it
