"""Swaps the tensors of a model for stand-ins while it is recorded, and gives tensors the user's own names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)

#: Under this name simulators keep their state on a module; it is no part of the model.
RESERVED = "_dwindle"

#: Dictionaries and lists that every module has.
_TORCHS_OWN = frozenset(vars(nn.Module()))


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of a model without those of simulators."""
    for path, module in model.named_modules():
        if RESERVED not in path.split("."):
            yield path, module


def user_name(name: str) -> str:
    """Return the user's name of a parametrized parameter: ``a.parametrizations.weight.original`` is ``a.weight``."""
    if ".original" in name and "parametrizations." in name and name.endswith(".original"):
        head, _, tail = name.rpartition("parametrizations.")
        return head + tail[: -len(".original")]
    return name


def _tensor_slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """Yield ``(dictionary, key, kind, name)`` for every tensor that a module of ``model`` holds."""
    for path, module in modules_of(model):
        prefix = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module._parameters, key, "parameter", user_name(prefix + key)
        for key, held in module._buffers.items():
            if held is not None:
                yield module._buffers, key, "buffer", prefix + key
        for key, held in vars(module).items():
            if isinstance(held, torch.Tensor):
                yield vars(module), key, "buffer", prefix + key


@contextmanager
def stand_ins(model: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[Any]]:
    """Swap every tensor of the model for ``replace(tensor)``; yields ``(tensor, kind, name)``; restores on exit."""
    saved: list[tuple[Any, Any, torch.Tensor]] = []
    substitutes: dict[int, torch.Tensor] = {}
    listing: list[tuple[torch.Tensor, str, str]] = []
    try:
        for slots, key, kind, name in list(_tensor_slots(model)):
            original = slots[key]
            if id(original) not in substitutes:
                substitutes[id(original)] = replace(original)
                listing.append((substitutes[id(original)], kind, name))
            if substitutes[id(original)] is not original:
                saved.append((slots, key, original))
                slots[key] = substitutes[id(original)]
        for module in model.modules():
            # recurrent modules keep a second list of their parameters
            flat = vars(module).get("_flat_weights")
            if isinstance(flat, list):
                for position, original in enumerate(flat):
                    if isinstance(original, torch.Tensor) and id(original) in substitutes:
                        saved.append((flat, position, original))
                        flat[position] = substitutes[id(original)]
        yield listing
    finally:
        for slots, key, original in saved:
            slots[key] = original


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore on exit what a forward pass assigned to its modules (``self.features = x``, counters, caches)."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    contents = [
        (held, held.copy())
        for _, saved in before
        for key, held in saved.items()
        if (type(held) in (dict, list) and key not in _TORCHS_OWN)
        or (isinstance(held, dict) and "_hooks" in key)
    ]
    try:
        yield
    finally:
        for held, items in contents:
            if isinstance(held, dict) and not _same(list(held.items()), list(items.items())):
                held.clear()
                held.update(items)
            elif type(held) is list and not _same(list(enumerate(held)), list(enumerate(items))):
                held[:] = items
        for module, saved in before:
            fields = vars(module)
            for key in [key for key in fields if key not in saved]:
                del fields[key]
            for key, held in saved.items():
                if fields.get(key) is not held:
                    fields[key] = held


def _same(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> bool:
    return len(first) == len(second) and all(
        key is other and a is b for (key, a), (other, b) in zip(first, second, strict=True)
    )


def tensor_dictionaries(model: nn.Module) -> list[tuple[str, str]]:
    """Path of the module and name of every plain dictionary attribute that holds tensors only: it may be a cache."""
    return [
        (path, key)
        for path, module in modules_of(model)
        for key, held in vars(module).items()
        if type(held) is dict
        and key not in _TORCHS_OWN
        and held
        and all(isinstance(item, torch.Tensor) for item in held.values())
    ]


def empty_caches(model: nn.Module, caches: list[tuple[str, str]]) -> None:
    """Empty the dictionaries that :func:`tensor_dictionaries` named: what they held no longer fits."""
    for path, key in caches:
        vars(model.get_submodule(path))[key].clear()


def assigned_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that modules hold as plain attributes, with their names."""
    for slots, key, kind, name in _tensor_slots(model):
        if kind == "buffer":
            yield name, slots[key]


def copied(model: _Model) -> _Model:
    """Return a deep copy, also of a model that holds computed tensors (old-style weight norm, kept features).

    Those are detached in the copy; torch itself refuses to copy them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, held in vars(module).items():
            if key not in _TORCHS_OWN:
                _detached(held, memo, 3)
        _detached(list(module._buffers.values()), memo, 1)
    return copy.deepcopy(model, memo)


def own_object(item: Any) -> Any:
    """A copy of an input that a forward pass may change (a cache); tensors, numbers and modules as they are."""
    if not hasattr(item, "__dict__") or callable(item) or isinstance(item, torch.Tensor | type):
        return item
    memo: dict[int, Any] = {}
    _detached(item, memo, 4)
    return copy.deepcopy(item, memo)


def _detached(held: Any, memo: dict[int, Any], depth: int) -> None:
    """Note detached copies of the computed tensors in containers and plain objects."""
    if isinstance(held, torch.Tensor):
        if not held.is_leaf:
            memo[id(held)] = held.detach().clone()
    elif depth and not isinstance(held, nn.Module | type | str | bytes):
        items: Any = (
            held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
        )
        for item in (*items, *getattr(held, "__dict__", {}).values()):
            _detached(item, memo, depth - 1)


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape and dtype on the meta device, a parameter when ``tensor`` is one."""
    empty = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
