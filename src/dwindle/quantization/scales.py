"""From what observers saw and from the weights to the packed scales and zero points of a simulation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.folding import Fold
from dwindle.quantization.numbers import scale_and_zero_point
from dwindle.quantization.observers import Observer
from dwindle.quantization.places import Placement, WeightPlace
from dwindle.quantization.recording import Recording
from dwindle.quantization.requantization import settle_activations, settled_weight_scale
from dwindle.quantization.simulation import PlacedMode, Simulation, WeightSlot
from dwindle.quantization.weights import is_depthwise, weight_levels
from dwindle.training.inputs import Inputs

HEADROOM = 4.0
"""Ranges of averages that gates are computed from are made so many times as wide as what was seen.

A batch of pictures has a million pixels and only some dozens of averages, so those of new pictures often lie outside of
the range seen; what is clipped there multiplies a whole channel, while two bits less are hardly noticed.
"""


@dataclass(frozen=True)
class ScaleOptions:
    """How scales are chosen.

    Attributes:
        avoid_saturation: Keep pairs of weights within 16-bit sums.
        weight_range: ``"minmax"`` or ``"mse"``.
        settle: Make ratios of scales odd (:mod:`dwindle.quantization.requantization`).
    """

    avoid_saturation: bool = True
    weight_range: str = "minmax"
    settle: bool = True


def packed_parameters(
    model: nn.Module,
    recording: Recording,
    placement: Placement,
    folds: list[Fold],
    observers: list[Observer],
    batches: list[Inputs],
    options: ScaleOptions,
) -> tuple[tuple[Tensor, ...], dict[CallKey, WeightSlot]]:
    """Return the packed scales and zero points of activations and weights, and where weights' stand.

    Args:
        model: The float model, with its batch normalizations folded.
        recording: Its operations.
        placement: Where quantizers stand.
        folds: The folded normalizations.
        observers: What saw the activations, one per quantizer.
        batches: Inputs of the model, one or more.
        options: How scales are chosen.

    Raises:
        ConfigError: A range or a weight is not finite; the message names it.
    """
    scale, zero_point = activation_parameters(placement, observers)
    units: dict[CallKey, float] = {}
    if options.settle:
        scale, zero_point, units = settle_activations(recording, placement, scale, zero_point, batches)
    slots, weight_scale, weight_zero_point = weight_parameters(
        model, placement, folds, batches[0], scale, units, options
    )
    device = next(model.parameters()).device
    packed = (scale, zero_point, weight_scale, weight_zero_point)
    return tuple(part.to(device) for part in packed), slots


def activation_parameters(placement: Placement, observers: list[Observer]) -> tuple[Tensor, Tensor]:
    """Return scales (float32) and zero points (int32) of all activations.

    Raises:
        ConfigError: An observer saw nothing finite; the message names its place.
    """
    scales, zero_points = [], []
    for number, (form, observer) in enumerate(zip(placement.forms, observers, strict=True)):
        name = placement.names[number]
        try:
            low, high = observer.range(form)
        except ValueError as error:
            raise ConfigError(f"no finite value reached {name} in the calibration data: {error}") from error
        if low == high == 0.0:
            warnings.warn(
                f"only zeros reached {name} in the calibration data; its range is taken to be -1 to 1",
                stacklevel=5,
            )
            low, high = -1.0, 1.0
        if number in placement.averages:
            low, high = low * HEADROOM, high * HEADROOM
        scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), form)
        scales.append(scale)
        zero_points.append(zero_point)
    return torch.stack(scales), torch.stack(zero_points)


class _WeightsMode(PlacedMode):
    """Takes the weights as the calls read them (after masks and other parametrizations)."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.weights: dict[Any, Tensor] = {}
        self.biases: dict[Any, Tensor] = {}
        self.groups: dict[Any, int] = {}

    def on_call(self, key: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the weight and the bias of a call."""
        slot = self.simulation.slots.get(key)
        if slot is not None:
            for found, position in ((self.weights, slot.place.position), (self.biases, slot.place.bias)):
                if position is not None:
                    where = position[0]
                    found[key] = args[where] if isinstance(where, int) else kwargs[where]
            self.groups[key] = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        return super().on_call(key, func, args, kwargs)


def weight_parameters(
    model: nn.Module,
    placement: Placement,
    folds: list[Fold],
    example: Inputs,
    activation_scale: Tensor,
    units: dict[CallKey, float],
    options: ScaleOptions,
) -> tuple[dict[Any, WeightSlot], Tensor, Tensor]:
    """Return the slots of all weights, and their packed scales and zero points.

    Scales are kept large enough that the int32 bias, whose scale is input scale times weight scale, does not
    overflow: a channel of nearly zero weights would otherwise lose its bias in the runtime.

    Args:
        model: With its batch normalizations folded.
        placement: Where quantizers stand.
        folds: The folded normalizations.
        example: Arguments of one forward.
        activation_scale: Scales of the activations.
        units: What input scale times weight scale has to fit, where that is to be settled.
        options: How scales are chosen.
    """
    slots = {key: WeightSlot(weight, 0, 0) for key, weight in placement.weights.items()}
    mode = _WeightsMode(Simulation(placement, slots, folds))
    run_with(model, mode, *example)
    scales: list[Tensor] = []
    zero_points: list[Tensor] = []
    start = 0
    for key, slot in slots.items():
        weight, bias = mode.weights[key].detach(), mode.biases.get(key)
        least = None
        if bias is not None and mode.simulation.has_integer_kernel(slot):
            input_scale = float(activation_scale[slot.place.input_quantizer])
            least = _smallest_scale(bias.detach(), input_scale, weight, slot.place.axis)
        pairs = options.avoid_saturation and not is_depthwise(weight, mode.groups.get(key, 1))
        scale, zero_point = _levels_of(slot.place, weight, pairs, options.weight_range == "mse", least)
        if key in units and slot.place.form.symmetric and mode.simulation.has_integer_kernel(slot):
            read = float(activation_scale[slot.place.input_quantizer])
            scale = settled_weight_scale(scale, read, units[key])
        slot.start, slot.length = start, scale.numel()
        start += slot.length
        scales.append(scale.cpu())
        zero_points.append(zero_point.cpu())
    return slots, torch.cat(scales), torch.cat(zero_points)


def _smallest_scale(bias: Tensor, input_scale: float, weight: Tensor, axis: int | None) -> Tensor:
    """Return scales of the weight, float64, with which the int32 bias stays below half of its largest level."""
    floor = bias.abs().double().reshape(-1) / (input_scale * 2.0**30)
    return floor if axis is not None and floor.numel() == weight.shape[axis] else floor.amax().reshape(1)


def _levels_of(
    place: WeightPlace, weight: Tensor, avoid_saturation: bool, clip: bool, least: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a weight's scales and zero points.

    Raises:
        ConfigError: It cannot be quantized; the message names it.
    """
    options: dict[str, Any] = {"avoid_saturation": avoid_saturation, "clip": clip, "least": least}
    try:
        return weight_levels(weight, place.axis, place.form, place.block, **options)
    except ConfigError as error:
        raise ConfigError(f"{place.name} cannot be quantized: {error}") from error
