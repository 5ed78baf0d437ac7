"""From kept blocks to the masks of every target: of the ranked ones, and of those that follow them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dwindle.config import PruningSetting, Target, aligned_mask
from dwindle.config.granularity import activation_axis, weight_axes
from dwindle.pruning.coupling import Coupling
from dwindle.pruning.groups import MaskedAxis
from dwindle.pruning.plan import PruningPlan

Masks = dict[Target, Tensor]


def masks_of_goals(plan: PruningPlan, keep: Mapping[Target, Tensor]) -> Masks:
    """Return the masks of the ranked targets, in the smallest shape that broadcasts.

    Args:
        plan: What is pruned.
        keep: Which blocks stay.
    """
    return {
        target: planned.granularity.compact(keep[target], planned.shape).float()
        for target, planned in plan.goals.items()
    }


def follow_axes(masks: Masks, coupling: Coupling, axes: Iterable[MaskedAxis]) -> dict[Target, str]:
    """Mask in place what else makes or shifts the masked channels of each axis.

    Returns:
        For each parameter that was masked so, what it follows.
    """
    followed: dict[Target, str] = {}
    for masked in axes:
        if bool(masked.keep.all()):
            continue
        for target, dims in coupling.followers(masked.axis, masked.keep, masked.ranked).items():
            parameter = coupling.modules[target.module]._parameters[target.name]
            if parameter is None:
                continue
            for dim, stays in dims.items():
                shape = [1] * parameter.dim()
                shape[dim] = -1
                _multiply(masks, target, stays.float().reshape(shape))
            followed[target] = masked.name
    return followed


def follow_alignments(
    masks: Masks, settings: Mapping[Target, PruningSetting], modules: Mapping[str, nn.Module]
) -> dict[Target, str]:
    """Mask in place what the config aligns with another target (a bias with its weight).

    Returns:
        For each target that was masked so, what it follows.
    """
    followed: dict[Target, str] = {}
    pending = {target: setting.align for target, setting in settings.items() if setting.align is not None}
    while pending:
        ready = {
            target: align
            for target, align in pending.items()
            if _source(target, align) not in pending or _source(target, align) == target
        }
        if not ready:
            break  # they follow each other in a circle: nothing to start from
        for target, align in ready.items():
            del pending[target]
            source = _source(target, align)
            mask = masks.get(source)
            if mask is None:
                continue
            module = modules[source.module]
            parameter = module._parameters.get(source.name)
            if parameter is not None:
                mask = mask.expand(parameter.shape)
            _multiply(
                masks, target, _shaped(aligned_mask(mask, align, module), target, modules[target.module])
            )
            followed[target] = str(source)
    return followed


def _source(target: Target, align: Any) -> Target:
    return Target(target.module if align.module_name is None else align.module_name, align.target_name)


def _shaped(mask: Tensor, target: Target, module: nn.Module) -> Tensor:
    """Return an aligned mask in a shape that broadcasts to a parameter; inputs and outputs keep it flat."""
    parameter = module._parameters.get(target.name)
    if parameter is None or mask.dim() == parameter.dim() or mask.dim() != 1:
        return mask
    shape = [1] * parameter.dim()
    shape[weight_axes(type(module), parameter.dim())[0]] = -1
    return mask.reshape(shape)


def _multiply(masks: Masks, target: Target, mask: Tensor) -> None:
    old = masks.get(target)
    masks[target] = mask if old is None else old * mask.to(old.device)


def mask_axis(target: Target, module: nn.Module, mask: Tensor) -> int | None:
    """Return the dimension along which a flat mask of an input or output runs."""
    return None if target.is_parameter or mask.dim() != 1 else activation_axis(type(module))


def tied_targets(model: nn.Module) -> dict[Target, list[Target]]:
    """Return, for each parameter that stands in several modules, all places, under each of them."""
    places: dict[int, list[Target]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(Target(name, own))
    return {target: group for group in places.values() if len(group) > 1 for target in group}


def tie(masks: Masks, model: nn.Module) -> dict[Target, str]:
    """Give a parameter that stands in several modules the same mask in all of them, in place.

    Returns:
        For each place that was masked so, the place it follows.
    """
    followed: dict[Target, str] = {}
    groups = tied_targets(model)
    for target in list(masks):
        for other in groups.get(target, ()):
            if other == target:
                continue
            shared = masks[target] if other not in masks else masks[target] * masks[other]
            masks[target] = masks[other] = shared
            followed.setdefault(other, str(target))
    return followed
