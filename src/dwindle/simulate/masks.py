"""Masks on targets: attach, change, read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.config.targets import Target
from dwindle.simulate.attaching import (
    detach,
    module_of,
    register_simulator,
    simulated_targets,
    simulator_of,
)
from dwindle.simulate.simulators import MaskSimulator


def attach_mask(
    model: nn.Module,
    target: Target,
    mask: Tensor | None = None,
    *,
    apply_method: str = "mul",
    axis: int | None = None,
) -> MaskSimulator:
    """Mask a target from now on. A mask that is there already is replaced.

    Args:
        model: The model, changed in place.
        target: A parameter, an input or an output.
        mask: 1 (or True) stays, 0 goes; any shape that broadcasts to the target. None keeps everything.
        apply_method: ``mul``, ``add`` or ``bypass``, see :class:`MaskSimulator`.
        axis: For a mask with one dimension on an input or output: the dimension it runs along.

    Returns:
        The simulator.

    Raises:
        ConfigError: The target does not exist, or the mask does not fit it.
    """
    module = module_of(model, target)
    value = _fitting(module, target, mask, axis)
    simulator = simulator_of(model, target, "mask")
    if isinstance(simulator, MaskSimulator) and simulator.apply_method == apply_method:
        simulator.value, simulator.axis = value, axis
        return simulator
    if simulator is not None:
        raise ConfigError(f"{target} has a mask with another apply_method; detach it first")
    simulator = MaskSimulator(value, apply_method, axis)
    register_simulator(model, target, simulator, "mask")
    return simulator


def set_mask(model: nn.Module, target: Target, mask: Tensor) -> None:
    """Change the mask of a target that has one.

    Args:
        model: The model that holds the target.
        target: Where the mask sits.
        mask: The new one, 0 and 1, of a shape that broadcasts to the target's.

    Raises:
        ConfigError: The target has no mask, or the new one does not fit it.
    """
    simulator = simulator_of(model, target, "mask")
    if not isinstance(simulator, MaskSimulator):
        raise ConfigError(f"{target} has no mask; use attach_mask")
    simulator.value = _fitting(module_of(model, target), target, mask, simulator.axis)


def _fitting(module: nn.Module, target: Target, mask: Tensor | None, axis: int | None) -> Tensor:
    """Return a mask in the dtype and on the device of the target."""
    like = module._parameters.get(target.name) if target.is_parameter else None
    if like is None:
        like = next(iter(module.parameters()), None)
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype()
    device = like.device if like is not None else torch.device("cpu")
    if mask is None:
        mask = torch.ones(())
    if axis is not None and mask.dim() != 1:
        raise ConfigError(
            f"{target}: a mask along axis {axis} has one dimension, not shape {list(mask.shape)}"
        )
    if target.is_parameter and like is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, like.shape) == like.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ConfigError(
                f"{target}: a mask of shape {list(mask.shape)} does not fit a parameter of shape "
                f"{list(like.shape)}"
            )
    return mask.detach().to(device=device, dtype=dtype)


def attach_masks(model: nn.Module, masks: Iterable[tuple[Target, Tensor, str, int | None]]) -> None:
    """Attach several masks, or none: when one of them fails, the model is as it was.

    Args:
        model: The model, changed in place.
        masks: Target, mask, apply method and axis of each, as in :func:`attach_mask`.

    Raises:
        ConfigError: As :func:`attach_mask`.
    """
    before: dict[Target, MaskSimulator] = {
        target: simulator
        for target, simulator in simulated_targets(model, "mask").items()
        if isinstance(simulator, MaskSimulator)
    }
    values = {target: (simulator.value, simulator.axis) for target, simulator in before.items()}
    fresh: list[Target] = []
    try:
        for target, mask, method, axis in masks:
            attach_mask(model, target, mask, apply_method=method, axis=axis)
            if target not in before:
                fresh.append(target)
    except Exception:
        detach(model, keep_values=False, targets=fresh, stage="mask")
        for target, simulator in before.items():
            simulator.value, simulator.axis = values[target]
        raise


def get_masks(model: nn.Module) -> dict[Target, Tensor]:
    """Return the masks of a model: of parameters in full size (views), of inputs and outputs as they are."""
    masks = {}
    modules = dict(model.named_modules())
    for target, simulator in simulated_targets(model, "mask").items():
        if isinstance(simulator, MaskSimulator):
            parameter = modules[target.module]._parameters.get(target.name)
            masks[target] = simulator.value if parameter is None else simulator.value.expand(parameter.shape)
    return masks


def masks_as_nested(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the masks as NNI does: ``{module: {target: mask}}``."""
    nested: dict[str, dict[str, Tensor]] = {}
    for target, mask in get_masks(model).items():
        nested.setdefault(target.module, {})[target.name] = mask
    return nested
