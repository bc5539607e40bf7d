"""The drop-in for Megatron-Core."""

from redline.megatron.old_address import restore_old_address

__all__ = ["restore_old_address"]
