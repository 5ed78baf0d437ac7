"""Accuracy-aware quantization: the layers that do most harm go back to float until the loss is within a bound.

Layers are ranked by what the quality gains when one alone is left in float, with all others quantized. They go back
from the most harmful on; after each the model is quantized anew, so that what is measured is what one gets. A layer
that did not help is quantized again. When a layer has gone back, the ranking of the rest still holds as an order to
try; only the measured quality decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization.calls import CallKey
from dwindle.quantization.places import Placement
from dwindle.quantization.simulation import simulation_of
from dwindle.training.progress import tracked

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class QuantizedWithin:
    """A quantized model and what was left in float for its quality.

    Attributes:
        model: The quantized model.
        float_quality: Quality of the float model.
        quality: Quality of ``model``.
        first_quality: Quality with everything quantized.
        reverted: Modules that were left in float, the most harmful first.
        gains: What the quality gained when a module alone was left in float, for all modules.
    """

    model: nn.Module
    float_quality: float
    quality: float
    first_quality: float
    reverted: list[str]
    gains: dict[str, float]

    @property
    def drop(self) -> float:
        """How much quality was lost."""
        return self.float_quality - self.quality


def quantize_within(
    model: nn.Module,
    calibration_data: Any,
    evaluate: Evaluate,
    max_drop: float,
    quantize: Callable[..., nn.Module],
    **options: Any,
) -> QuantizedWithin:
    """Quantize a model so that it loses at most ``max_drop``.

    Args:
        model: A float model; it is not changed.
        calibration_data: Read once for each attempt: an iterator is kept as a list.
        evaluate: Quality of a model, larger is better.
        max_drop: How much of it may be lost, at least 0.
        quantize: Quantizes a model, as :func:`dwindle.quantize` does. Layers are ranked without bias correction
            and learned rounding, and measured with them.
        **options: Arguments of ``quantize``.

    Raises:
        ConfigError: ``max_drop`` is negative, or the bound cannot be kept although some layer is still quantized.
        DwindleError: The quality is not a finite number.
    """
    if max_drop < 0:
        raise ConfigError(f"max_drop {max_drop} is negative")
    if iter(calibration_data) is calibration_data:
        calibration_data = list(calibration_data)
    wished = list(options.pop("config_list", None) or [])

    def attempt(modules: list[str], **other: Any) -> nn.Module:
        config_list = [*wished, *_in_float(modules)]
        return quantize(model, calibration_data, config_list=config_list, **{**options, **other})

    reference = _quality(evaluate, model)
    best = attempt([])
    quality = first = _quality(evaluate, best)
    gains: dict[str, float] = {}
    reverted: list[str] = []
    if reference - quality > max_drop:
        # Weights and biases that were changed to suit the rounding say nothing about a layer without it.
        plain = attempt([], bias_correction=False, rounding="nearest")
        gains = rank(plain, evaluate, _quality(evaluate, plain))
        for module in sorted(gains, key=lambda name: -gains[name]):
            if len(reverted) + 1 >= len(gains):
                break  # the last layer would leave nothing quantized
            candidate = attempt([*reverted, module])
            found = _quality(evaluate, candidate)
            if found > quality:
                best, quality = candidate, found
                reverted.append(module)
            if reference - quality <= max_drop:
                break
    if reference - quality > max_drop:
        raise ConfigError(
            f"with {len(reverted)} of {len(gains)} layers in float the quality is still {quality:g}, "
            f"{reference - quality:g} below the float model's {reference:g}: more than max_drop {max_drop:g}"
        )
    return QuantizedWithin(best, reference, quality, first, reverted, gains)


def _in_float(modules: list[str]) -> list[dict[str, Any]]:
    if not modules:
        return []
    return [{"op_names": modules, "target_names": ["_input_0"], "quant_dtype": None}]


def _quality(evaluate: Evaluate, model: nn.Module) -> float:
    value = float(evaluate(model))
    if not math.isfinite(value):
        raise DwindleError(f"evaluate returned {value}")
    return value


def rank(model: nn.Module, evaluate: Evaluate, quality: float) -> dict[str, float]:
    """Return what the quality gains when each module alone computes in float.

    Args:
        model: A quantized model; as it was afterwards.
        evaluate: Quality of a model, larger is better.
        quality: Quality of ``model``.
    """
    simulation = simulation_of(model)
    placement, slots = simulation.placement, simulation.slots
    gains = {}
    try:
        for module in tracked(list(dict.fromkeys(key.module for key in slots)), "harm of layers"):
            simulation.slots = {key: slot for key, slot in slots.items() if key.module != module}
            simulation.placement = _without(placement, {key for key in slots if key.module == module})
            gains[module] = _quality(evaluate, model) - quality
    finally:
        simulation.placement, simulation.slots = placement, slots
    return gains


def _without(placement: Placement, keys: set[CallKey]) -> Placement:
    """Return a placement in which the calls of a module read floats: what they alone read is not quantized."""
    own = {placement.weights[key].input_quantizer for key in keys}
    shared = {place.input_quantizer for key, place in placement.weights.items() if key not in keys}
    gone = own - shared
    return replace(
        placement,
        outputs={key: number for key, number in placement.outputs.items() if number not in gone},
        inputs={
            key: {position: number for position, number in places.items() if number not in gone}
            for key, places in placement.inputs.items()
        },
        weights={key: place for key, place in placement.weights.items() if key not in keys},
    )
