"""What a type checker sees at the old address: all of the new one's."""

from redline.extensions.transformer_engine import *  # noqa: F403
