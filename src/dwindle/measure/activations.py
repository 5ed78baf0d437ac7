"""Counts the bytes of activations that live at the same time during one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dwindle.graph.modes import in_mode
from dwindle.measure.macs import counting_kernels
from dwindle.measure.structure import tensors_of


def peak_activation_bytes(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> int:
    """Return the largest number of bytes of live tensor storage during ``model(*args, **kwargs)``.

    The forward pass runs once in evaluation mode without gradients. After each operator the storages of all
    tensors that are still referenced are added up: the inputs (alive throughout), the intermediate results
    and the outputs. Parameters and buffers are not counted, views and in-place results share the storage
    they look into, and a tensor is gone as soon as Python lets go of it. The figure is the same in every
    run and on every machine. Scratch memory inside a kernel is not seen.

    Args:
        model: The model.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    kwargs = dict(kwargs or {})
    known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    inputs = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors_of((tuple(args), kwargs))
    }
    watcher = _Watcher(excluded=known | set(inputs), base=sum(inputs.values()))
    with (
        in_mode(model, training=False),
        counting_kernels(),
        torch.inference_mode(False),
        torch.no_grad(),
        watcher,
    ):
        model(*args, **kwargs)
    return watcher.peak


class _Watcher(TorchDispatchMode):
    """Follows which storages made inside are still alive."""

    def __init__(self, excluded: set[int], base: int) -> None:
        super().__init__()
        self._excluded = excluded
        self._base = base
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = base

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._excluded:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self._base + sum(size for _, size in self._alive.values()))
        return out
