"""Models pruned with ``torch.nn.utils.prune``: their masks become masks of dwindle.

There a pruned ``weight`` is kept as the parameter ``weight_orig`` and the buffer ``weight_mask``, and a hook computes
``weight`` before each forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError

_ORIGINAL, _MASK = "_orig", "_mask"


@dataclass(frozen=True)
class _Place:
    """A parameter that torch masks: its module, its name, the id of the hook that computes it."""

    module: nn.Module
    target: Target
    hook: int


def import_torch_masks(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Turn the masks of ``torch.nn.utils.prune`` into masks of dwindle, in place.

    The model computes what it computed before. Its parameters are the same objects under their own names again
    (``weight`` in place of ``weight_orig``), so an optimizer goes on; masked weights keep their dense values.

    Args:
        model: A model that carries such masks; others are left as they are.

    Returns:
        The masks, ``{module: {parameter: mask}}``, for :func:`dwindle.realize.realize` to make real.

    Raises:
        ConfigError: A mask holds other values than 0 and 1, or no hook uses it; the model was not touched.
    """
    places = [place for name, module in model.named_modules() for place in _places(name, module)]
    for place in places:
        _check(place)
    masks = [(place.target, _restore(place)) for place in places]
    simulate.attach_masks(model, [(target, mask, "mul", None) for target, mask in masks])
    nested: dict[str, dict[str, Tensor]] = {}
    for target, mask in masks:
        nested.setdefault(target.module, {})[target.name] = mask
    return nested


def split_torch_state(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split the ``state_dict`` of a model pruned with ``torch.nn.utils.prune`` into weights and masks.

    Args:
        state: With keys such as ``conv.weight_orig`` and ``conv.weight_mask``.

    Returns:
        A ``state_dict`` that the plain model loads (dense values), and the masks, ``{module: {parameter: mask}}``, as
        :func:`dwindle.realize.realize` takes them.

    Raises:
        ConfigError: A parameter has no mask of its shape, or stands there twice.
    """
    plain: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {}
    pruned = {
        key.removesuffix(_ORIGINAL)
        for key in state
        if key.endswith(_ORIGINAL) and key.removesuffix(_ORIGINAL) + _MASK in state
    }
    for key, value in state.items():
        name = next((key.removesuffix(end) for end in (_ORIGINAL, _MASK) if key.endswith(end)), key)
        if name not in pruned or name == key:
            if key in pruned:
                raise ConfigError(f"the state holds {key!r} beside {key + _ORIGINAL!r}")
            plain[key] = value
        elif key.endswith(_ORIGINAL):
            plain[name] = value
        else:
            original = state[name + _ORIGINAL]
            if original.shape != value.shape:
                raise ConfigError(
                    f"{key!r} has shape {list(value.shape)}, its parameter {list(original.shape)}"
                )
            module, _, parameter = name.rpartition(".")
            masks.setdefault(module, {})[parameter] = value
    return plain, masks


def _places(path: str, module: nn.Module) -> list[_Place]:
    hooks = {
        hook._tensor_name: number
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, BasePruningMethod)
    }
    names = [
        name.removesuffix(_ORIGINAL)
        for name in module._parameters
        if name.endswith(_ORIGINAL) and name.removesuffix(_ORIGINAL) + _MASK in module._buffers
    ]
    return [_Place(module, Target(path, name), hooks.get(name, -1)) for name in names]


def _check(place: _Place) -> None:
    mask = place.module._buffers[place.target.name + _MASK]
    if mask is None or not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError(f"{place.target}{_MASK} holds other values than 0 and 1")
    if place.hook < 0:
        raise ConfigError(
            f"{place.target} has a mask that no hook of torch.nn.utils.prune applies; load its state_dict into the "
            "plain model with split_torch_state()"
        )


def _restore(place: _Place) -> Tensor:
    """Make the parameter what it was before torch masked it; return its mask."""
    module, name = place.module, place.target.name
    del module._forward_pre_hooks[place.hook]
    module._forward_pre_hooks_with_kwargs.pop(place.hook, None)
    mask = module._buffers.pop(name + _MASK)
    parameters = dict(module._parameters)
    original = parameters[name + _ORIGINAL]
    module.__dict__.pop(name, None)  # what the hook computed last
    del module._parameters[name + _ORIGINAL]
    setattr(module, name, original)  # tells recurrent modules, which hold a list of their weights
    # torch put the pruned parameter behind the others; a weight stands in front, and recurrent modules know the order
    order = [key.removesuffix(_ORIGINAL) if key == name + _ORIGINAL else key for key in parameters]
    known = ["weight"] if name == "weight" else list(getattr(module, "_flat_weights_names", ()))
    order.sort(key=lambda key: known.index(key) if key in known else len(known))
    entries = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({key: entries[key] for key in order})
    assert isinstance(mask, torch.Tensor)
    return mask
