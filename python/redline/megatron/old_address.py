"""Megatron-Core's old address, where Megatron-Core has taken it away."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from redline.signpost import Signpost

address = "megatron.core.transformer.custom_layers.transformer_engine"
package = address.rpartition(".")[0]


class Restorer(MetaPathFinder, Loader):
    """Finds the old address, and the package that it lay in, where no other finder does."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name in (address, package):
            return ModuleSpec(name, self, origin=__name__, is_package=name == package)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == address:
            post = Signpost(address)
            module.__getattr__, module.__dir__ = post.take, post.names


def restore_old_address() -> None:
    """Makes `megatron.core.transformer.custom_layers.transformer_engine` importable again.

    It forwards to Megatron's own `megatron.core.extensions.transformer_engine`, with a
    DeprecationWarning at each line that takes a name from it. Where Megatron still ships a module
    there, that one is imported: ours is asked last. Nothing of Megatron is imported here, and a
    second call changes nothing.
    """
    if not any(isinstance(finder, Restorer) for finder in sys.meta_path):
        sys.meta_path.append(Restorer())
