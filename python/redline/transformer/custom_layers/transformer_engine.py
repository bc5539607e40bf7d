"""The old address: a notice of the move and a forward, nothing else."""

from redline.signpost import Signpost

_post = Signpost(__name__)
__getattr__, __dir__ = _post.take, _post.names
