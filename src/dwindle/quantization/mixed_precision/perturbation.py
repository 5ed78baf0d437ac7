"""The mean squared error of rounding each tensor, at each number of bits that it may get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.levels import fake_quantize
from dwindle.quantization.mixed_precision.layers import Layer, ReadingMode, Structure, with_bits
from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.observers import Observer
from dwindle.quantization.simulation import WeightSlot
from dwindle.quantization.weights import weight_levels

Errors = list[dict[int, float]]
"""Mean squared error by number of bits, tensor by tensor."""


def rounding_error(
    weight: Tensor, axis: int | None, form: NumberFormat, block: int | None = None, *, clip: bool = False
) -> float:
    """Return the mean squared error of a weight rounded to levels, as :func:`dwindle.quantize` rounds it.

    Args:
        weight: Any floating tensor.
        axis: Dimension with a scale for each index; None for one scale.
        form: The levels.
        block: So many neighbours along the other dimension share a scale.
        clip: Clip where that loses least (``weight_range="mse"``).
    """
    scale, zero_point = weight_levels(weight, axis, form, block, clip=clip)
    rounded = fake_quantize(weight, scale, zero_point, form, axis, block)
    return float((rounded.double() - weight.double()).square().mean())


def weight_errors(structure: Structure, batch: Any, bits: Sequence[int], clip: bool) -> Errors:
    """Return the error of every layer's weight: at the bits it may get, or at those it has.

    Args:
        structure: The model.
        batch: ``(args, kwargs, target)``; it is run once, to see the weights as layers read them (masked, ...).
        bits: The choice.
        clip: As in :func:`rounding_error`.

    Raises:
        ConfigError: A weight cannot be rounded; the message names it.
    """
    weights: dict[CallKey, Tensor] = {}

    def keep(key: CallKey, value: Tensor, slot: WeightSlot) -> Tensor:
        weights[key] = value.detach()
        return value

    run_with(
        structure.model, ReadingMode(structure.simulation, lambda key, value: value, keep), batch[0], batch[1]
    )
    return [_errors_of(layer, weights[layer.calls[0]], bits, clip) for layer in structure.layers]


def _errors_of(layer: Layer, weight: Tensor, bits: Sequence[int], clip: bool) -> dict[int, float]:
    place = layer.place
    try:
        return {
            own: rounding_error(weight, place.axis, with_bits(place.form, own), place.block, clip=clip)
            for own in (bits if layer.is_free else [layer.bits])
        }
    except ConfigError as error:
        raise ConfigError(f"{layer.name} cannot be quantized: {error}") from error


def activation_errors(
    structure: Structure, batches: Sequence[Any], bits: Sequence[int], make: Callable[[], Observer]
) -> Errors:
    """Return the error of everything that layers read: at the bits it may get, or at those it has.

    Args:
        structure: The float model.
        batches: ``(args, kwargs, target)``, run through twice: for the ranges, then for the errors.
        bits: The choice.
        make: Makes an observer.

    Raises:
        ConfigError: No finite value reached a place.
    """
    observers = [make() for _ in structure.activations]
    over_inputs(structure, batches, lambda number, value: observers[number].update(value))
    forms = [
        {own: with_bits(found.form, own) for own in ([found.form.bits] if found.fixed else bits)}
        for found in structure.activations
    ]
    levels = []
    for activation, observer, own in zip(structure.activations, observers, forms, strict=True):
        try:
            ranges = {number: observer.range(form) for number, form in own.items()}
        except ValueError as error:
            raise ConfigError(f"no finite value reached {activation.name} in the data: {error}") from error
        levels.append(
            {
                number: scale_and_zero_point(torch.tensor(low), torch.tensor(high), own[number])
                for number, (low, high) in ranges.items()
            }
        )
    sums = [dict.fromkeys(own, 0.0) for own in forms]
    seen = [0] * len(forms)

    def compare(number: int, value: Tensor) -> None:
        seen[number] += value.numel()
        for own, (scale, zero_point) in levels[number].items():
            rounded = fake_quantize(
                value, scale.to(value.device), zero_point.to(value.device), forms[number][own]
            )
            sums[number][own] += float((rounded.double() - value.double()).square().sum())

    over_inputs(structure, batches, compare)
    return [
        {own: total / max(count, 1) for own, total in sum_.items()}
        for sum_, count in zip(sums, seen, strict=True)
    ]


def over_inputs(structure: Structure, batches: Sequence[Any], visit: Callable[[int, Tensor], None]) -> None:
    """Call a function with the number of each activation and its value, once for each value."""
    number_of = {key: activation.number for key, (_, activation) in structure.reads().items()}
    for args, kwargs, _ in batches:
        alive: dict[int, Tensor] = {}

        def on_input(key: CallKey, value: Tensor, alive: dict[int, Tensor] = alive) -> Tensor:
            if id(value) not in alive:  # identities stay unique only while the tensors live
                alive[id(value)] = value
                visit(number_of[key], value.detach())
            return value

        mode = ReadingMode(structure.simulation, on_input, lambda key, value, slot: value)
        run_with(structure.model, mode, args, kwargs)


__all__ = ["activation_errors", "over_inputs", "rounding_error", "weight_errors"]
