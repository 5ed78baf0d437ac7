"""Quantization: every layer alone has its weight, and what it reads, rounded to few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, track_modules
from dwindle.quantization.levels import fake_quantize
from dwindle.quantization.mixed_precision.choose import default_levels
from dwindle.quantization.mixed_precision.layers import Layer, ReadingMode, Structure, examine, with_bits
from dwindle.quantization.mixed_precision.perturbation import over_inputs
from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.simulation import WeightSlot
from dwindle.quantization.weights import weight_levels
from dwindle.search.sensitivities.points import Level, SensitivityTarget
from dwindle.search.sensitivities.subject import Selection
from dwindle.training.inputs import Inputs
from dwindle.training.progress import tracked

__all__ = ["RoundedLayers"]


class RoundedLayers:
    """The layers of a model, each rounded alone.

    Args:
        model: A float model; not changed.
        batches: Arguments of its forward; the ranges of inputs are taken from all of them.
        example: Arguments to record it with.
        bits: Numbers of bits, 2 to 8.
        input_bits: Bits of what the layer reads: ``"same"`` as its weight, a number, or None: it stays as it is.
        weight_range: ``"minmax"``, or ``"mse"``: weights are clipped where that loses least.
        observer: How ranges of inputs are found.
        backend: Whose places.
        selection: Only layers of these modules; the others are taken as they are (8 bits) when bits are chosen.
        options: What else a point depends on, as plain data.

    Raises:
        ConfigError: Nothing can be quantized.
    """

    kind = "quantization"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Inputs],
        *,
        example: Inputs,
        bits: Sequence[int],
        input_bits: int | str | None,
        weight_range: str,
        observer: str | Callable[[], Observer],
        backend: str,
        selection: Selection,
        options: Mapping[str, Any],
    ) -> None:
        self.bits, self.input_bits, self.clip = tuple(bits), input_bits, weight_range == "mse"
        self.options = dict(options)
        self.notes: list[str] = []
        default = default_levels(input_bits if isinstance(input_bits, int) else "strict")
        found = examine(model, example, None, backend, default)
        self.structure = _restricted(found, selection)
        self.layers = {layer.name: layer for layer in self.structure.layers if layer.is_free}
        self.targets = tuple(
            SensitivityTarget(
                self.kind, name, tuple(f"{own}.{what}" for own, what in layer.addresses), layer.size
            )
            for name, layer in self.layers.items()
        )
        self._observers: list[Observer] = []
        self._input_levels: dict[tuple[int, int], tuple[Tensor, Tensor, NumberFormat]] = {}
        if input_bits is not None:
            self._observers = [make_observer(observer) for _ in self.structure.activations]
            runs = [(args, kwargs, None) for args, kwargs in tracked(batches, "ranges: batches")]
            over_inputs(self.structure, runs, lambda number, value: self._observers[number].update(value))

    def levels(self, target: str) -> list[Level]:
        """Return the bits, the most first."""
        return [Level(float(bits), (bits, self._read_bits(bits))) for bits in sorted(self.bits, reverse=True)]

    def _read_bits(self, bits: int) -> int:
        """Return the bits of what a layer reads; 0 stands for as it is."""
        if self.input_bits is None:
            return 0
        return bits if isinstance(self.input_bits, str) else self.input_bits

    @contextmanager
    def variant(self, target: str, level: Level) -> Iterator[nn.Module]:
        """Give a model that rounds the operands of one layer in its forward."""
        layer, (bits, read_bits) = self.layers[target], level.detail
        weights: dict[CallKey, Tensor] = {}
        reads = self.structure.reads()

        def on_weight(key: CallKey, value: Tensor, slot: WeightSlot) -> Tensor:
            if key not in layer.calls:
                return value
            if key not in weights:
                weights[key] = self._rounded_weight(value, slot, bits)
            return weights[key]

        def on_input(key: CallKey, value: Tensor) -> Tensor:
            if key not in layer.calls or not read_bits:
                return value
            return self._rounded_input(value, reads[key][1].number, read_bits)

        with _reading(self.structure, on_input, on_weight) as model:
            yield model

    def _rounded_weight(self, value: Tensor, slot: WeightSlot, bits: int) -> Tensor:
        place, form = slot.place, with_bits(slot.place.form, bits)
        scale, zero_point = weight_levels(value, place.axis, form, place.block, clip=self.clip)
        return fake_quantize(value, scale, zero_point, form, place.axis, place.block)

    def _rounded_input(self, value: Tensor, number: int, bits: int) -> Tensor:
        if (number, bits) not in self._input_levels:
            activation = self.structure.activations[number]
            form = activation.form if activation.fixed else with_bits(activation.form, bits)
            try:
                low, high = self._observers[number].range(form)
            except ValueError as error:
                raise ConfigError(
                    f"no finite value reached {activation.name} in the data: {error}"
                ) from error
            bottom, top = (torch.tensor(edge, device=value.device) for edge in (low, high))
            self._input_levels[number, bits] = (*scale_and_zero_point(bottom, top, form), form)
        return fake_quantize(value, *self._input_levels[number, bits])


def _restricted(structure: Structure, selection: Selection) -> Structure:
    """Return the structure with the layers outside of a selection as they are."""
    if selection is None:
        return structure
    layers = tuple(
        layer if _is_selected(layer, selection) else replace(layer, fixed=True) for layer in structure.layers
    )
    return replace(structure, layers=layers)


def _is_selected(layer: Layer, selection: frozenset[str]) -> bool:
    return any(module in selection for module, _ in layer.addresses)


class _Enter:
    """Forward pre-hook of the root: switches the rounding on. A class, so that copies of the model round as well."""

    def __init__(self, make: Callable[[], ReadingMode], running: list[ReadingMode]) -> None:
        self.make, self.running = make, running

    def __call__(self, module: nn.Module, args: Any) -> None:
        mode = self.make()
        self.running.append(mode)
        mode.path.stack.append("")
        mode.__enter__()


class _Leave:
    """Forward hook of the root: switches the rounding off, also when the forward raised."""

    def __init__(self, running: list[ReadingMode]) -> None:
        self.running = running

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running:
            mode = self.running.pop()
            mode.__exit__(None, None, None)
            mode.path.stack.clear()


@contextmanager
def _reading(
    structure: Structure,
    on_input: Callable[[CallKey, Tensor], Tensor],
    on_weight: Callable[[CallKey, Tensor, WeightSlot], Tensor],
) -> Iterator[nn.Module]:
    """Give the structure's model, whose forward hands its layers' operands to functions inside the block."""
    model, running = structure.model, list[ReadingMode]()
    handles = track_modules(model, structure.simulation.path)
    make = partial(ReadingMode, structure.simulation, on_input, on_weight)
    leave = _Leave(running)
    handles.append(model.register_forward_pre_hook(_Enter(make, running), prepend=True))
    handles.append(model.register_forward_hook(leave, always_call=True))
    try:
        yield model
    finally:
        while running:  # an interrupt is no Exception: torch calls no hook then
            leave(model, (), None)
        for handle in handles:
            handle.remove()
