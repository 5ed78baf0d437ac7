"""Replacing modules of a model by their paths, everywhere they stand."""

from __future__ import annotations

from torch import nn

__all__ = ["ModulePlaces"]


class ModulePlaces:
    """Where the modules of a model stand.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module in all places of the one that stands at a path (not at the root)."""
        old = self.modules[name]
        for path, own in list(self.modules.items()):
            if own is old and path:
                parent, _, key = path.rpartition(".")
                self.modules[parent]._modules[key] = module
                self.modules[path] = module
