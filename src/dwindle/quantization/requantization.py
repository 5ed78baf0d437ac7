"""Scales whose ratios are odd: so that no rounding in an integer kernel is ever a near thing.

An integer kernel computes ``sum * ratio + zero_point`` and rounds, where ``sum`` is an integer and ``ratio`` is input
scale times weight scale by output scale. Every runtime computes the product in its own order, so wherever it lies
within the last bits of a half, one runtime rounds up and another down; what differs by one level in an early layer
differs everywhere some layers later. With scales as they come, that happens to a few values of every picture.

If instead ``ratio = p / q`` with integers and ``q`` odd, then no integer sum ever lies on a half (``2 * sum * p``
is even and ``q`` times an odd number is not), and none comes nearer to one than
``1 / (2 * q)`` of a level: ten to a thousand times the error of a float there. All runtimes then round alike, and files
give what the simulation gives. Scales of weights grow for it by less than ``2 / q`` of themselves, with ``q`` in the
hundreds (and ``p`` is 1) or thousands. Sums of two tensors, ``(a * p1 + b * p2) / q`` with integers ``p1``, ``p2`` and
an odd ``q``, and products of two, ``a * b / q``, are settled in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dwindle.quantization.calls import CallKey, Position, tensors_in
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.operators import PRODUCTS, SUMS
from dwindle.quantization.places import Placement
from dwindle.quantization.recording import Operation, Recording, Value
from dwindle.training.inputs import Inputs

_FEWEST = 33
"""Ratios are at least so large, so that making one an integer changes a scale by less than a thirtieth."""

_LARGEST = 4095
"""Beyond this a half would be nearly as near as with any other ratio, and nothing is gained."""

_SMALLEST_DENOMINATOR = 127
"""Denominators of the ratios of weights are about so large or larger, so that they change a scale little."""

_BOUNDED = frozenset(("relu6", "hardtanh", "hardtanh_", "clamp"))
"""Activations with an upper bound: the quantizer behind ends there, so that runtimes can leave the bound out."""


class Settling:
    """Settles the scales of one model's activations. Use :func:`settle_activations`.

    Args:
        recording: The operations, in order.
        placement: Where quantizers stand.
        scale: float32, one per quantizer; changed in place.

    Attributes:
        sums: The quantizer behind the sum with another tensor that a call's kernel does too.
        parts: Into how many units a level of that is cut; 0 where that was not possible.
    """

    def __init__(self, recording: Recording, placement: Placement, scale: Tensor) -> None:
        self.placement = placement
        self.scale = scale
        self.carried = carried_quantizers(recording, placement)
        self.behind = output_quantizers(recording, placement)
        self.producers = recording.producers()
        self.parts: dict[CallKey, int] = {}
        self.sums: dict[CallKey, int] = {}
        self.fixed = {
            placement.outputs[operation.key]
            for operation in recording.operations
            if operation.key in placement.outputs and operation.key.operation in _BOUNDED
        }

    def settle(self, operation: Operation) -> None:
        """Settle the scales that meet in one operation, as far as earlier ones left them free."""
        output = self.behind.get(operation.key)
        operands = operation.active_inputs
        if output is None or len(operands) != 2 or len(operation.inputs) != 2:
            return
        found = [(value, self._quantizer(operation.key, position, value)) for position, value in operands]
        quantizers = [number for _, number in found if number is not None]
        if output in quantizers:
            return
        if operation.key.operation in SUMS:
            makers = [self.producers.get(value.index) for value, number in found if number is None]
            fused = [
                maker.key for maker in makers if maker is not None and maker.key in self.placement.weights
            ]
            if len(quantizers) + len(fused) == 2 and quantizers:
                parts = self._settle_sum(quantizers, output)
                self.parts.update(dict.fromkeys(fused, parts))
                self.sums.update(dict.fromkeys(fused, output))
        elif operation.key.operation in PRODUCTS and len(quantizers) == 2:
            self._settle_product(quantizers[0], quantizers[1], output)

    def _quantizer(self, key: CallKey, position: Position, value: Value) -> int | None:
        own = self.placement.inputs.get(key, {}).get(position)
        return own if own is not None else self.carried.get(value.index)

    def _settle_sum(self, operands: list[int], output: int) -> int:
        """Make scales integer multiples of one unit, an odd one for the output; return that (0 if it cannot be)."""
        numbers = {*operands, output}
        free = [number for number in numbers if number not in self.fixed]
        held = [number for number in numbers if number in self.fixed]
        self.fixed |= numbers
        if len(held) > 1:
            return 0
        base = held[0] if held else output
        base_size = float(self.scale[base])
        parts = -(-_FEWEST * base_size // min(float(self.scale[number]) for number in numbers))
        parts = odd_at_least(parts) if base == output else parts
        if parts > _LARGEST:
            return 0
        found = {base: parts}
        for number in free:
            if number != base:
                whole = -(-float(self.scale[number]) * parts // base_size)
                found[number] = odd_at_least(whole) if number == output else whole
                self.scale[number] = base_size / parts * found[number]
        return int(found[output])

    def _settle_product(self, first: int, second: int, output: int) -> None:
        """Make the scale of a product an odd multiple of the product of the scales."""
        free = output not in self.fixed
        self.fixed.update((first, second, output))
        unit = float(self.scale[first]) * float(self.scale[second])
        parts = odd_at_least(float(self.scale[output]) / unit)
        if free and _FEWEST <= parts <= _LARGEST:
            self.scale[output] = unit * parts

    def units(self) -> dict[CallKey, float]:
        """Return what the products of input and weight scale have to fit, by the call."""
        found = {}
        for key in self.placement.weights:
            behind = self.behind.get(key, self.sums.get(key))
            parts = self.parts.get(key, 0 if key in self.sums else 1)
            if behind is not None and parts:
                found[key] = float(self.scale[behind]) / parts
        return found


def settle_activations(
    recording: Recording,
    placement: Placement,
    scale: Tensor,
    zero_point: Tensor,
    batches: Iterable[Inputs] = (),
) -> tuple[Tensor, Tensor, dict[CallKey, float]]:
    """Enlarge scales of activations a little, so that the sums and products of tensors have odd ratios.

    Args:
        recording: The operations of the model, in order.
        placement: Where its quantizers stand.
        scale: float32, one per quantizer.
        zero_point: int32, the same shape.
        batches: Inputs as the model will see them, whose own scales are settled by them.

    Returns:
        Scales at least as large as they were, zero points with which they cover the same ranges, and for calls with
        weights the unit that input scale times weight scale has to fit (see :func:`settled_weight_scale`).
    """
    settling = Settling(recording, placement, settle_inputs(recording, placement, scale, batches))
    for operation in recording.operations:
        settling.settle(operation)
    zero_points = [
        moved_zero_point(int(zero), float(old), float(new), form)
        for zero, old, new, form in zip(zero_point, scale, settling.scale, placement.forms, strict=True)
    ]
    moved = torch.tensor(zero_points, dtype=torch.int32, device=zero_point.device)
    return settling.scale, moved, settling.units()


def settle_inputs(
    recording: Recording, placement: Placement, scale: Tensor, batches: Iterable[Inputs]
) -> Tensor:
    """Enlarge scales of the model's inputs by up to a hundredth, so that no input lies near a half.

    That is possible where inputs are few different numbers, as those made of bytes are: pictures, spectra. Others stay
    as they are.

    Args:
        recording: The operations of the model, in order.
        placement: Where its quantizers stand.
        scale: float32, one per quantizer.
        batches: Inputs as the model will see them.

    Returns:
        The scales, changed where it helps.
    """
    made = recording.producers()
    readers = [
        (value.index, quantizer)
        for operation in recording.operations
        for position, value in operation.active_inputs
        for quantizer in [placement.inputs.get(operation.key, {}).get(position)]
        if quantizer is not None and value.index not in made
    ]
    settled, batches = scale.clone(), list(batches)
    for index, quantizer in dict(readers).items():
        seen = _different_values([list(tensors_in([list(args), kwargs]))[index] for args, kwargs in batches])
        if seen is not None:
            settled[quantizer] = _clear_of_halves(seen, float(scale[quantizer]), placement.forms[quantizer])
    return settled


_MOST_DIFFERENT = 4096
"""Inputs with more different values than this are taken for continuous."""


def _different_values(tensors: list[Tensor]) -> Tensor | None:
    """Return the different values, float64, or None if there are many."""
    seen = torch.zeros(0)
    for tensor in tensors:
        seen = torch.cat([seen.to(tensor), tensor.detach().reshape(-1).unique()]).unique()
        if len(seen) > _MOST_DIFFERENT:
            return None
    return seen.double().cpu()


def _clear_of_halves(values: Tensor, scale: float, form: NumberFormat) -> float:
    """Return the scale, of a hundred up to a hundredth larger, that keeps values furthest from halves of a level."""
    candidates = scale * torch.linspace(1.0, 1.01, 101, dtype=torch.float64)
    places = values / candidates[:, None]
    distance = (places - places.floor() - 0.5).abs()
    distance[places.abs() > form.highest - form.lowest] = 0.5  # clipped in any case
    return float(candidates[distance.amin(1).argmax()])


def moved_zero_point(zero_point: int, old: float, new: float, form: NumberFormat) -> int:
    """Return the zero point with which a larger scale covers what a smaller one did."""
    if form.symmetric or old == new:
        return zero_point
    return min(max(round(form.lowest + (zero_point - form.lowest) * old / new), form.lowest), form.highest)


def settled_weight_scale(scale: Tensor, input_scale: float, unit: float) -> Tensor:
    """Enlarge scales of a weight a little, so that ratios have the odd denominators of this module.

    Args:
        scale: One value or one per channel.
        input_scale: Scale of the activation that the call reads.
        unit: Scale of the quantizer behind the call, or an odd part of it.

    Returns:
        Scales of the same shape and dtype, at least as large, with ``input_scale * scale / unit = p / q``.
    """
    ratio = unit / (input_scale * scale.double())
    above = (_SMALLEST_DENOMINATOR / ratio).ceil().clamp(min=1.0)
    below = ((above * ratio * (1 + 1e-9) - 1) / 2).floor() * 2 + 1
    return (unit * above / (input_scale * below)).to(scale.dtype)


def odd_at_least(number: float) -> float:
    """Return the smallest odd integer that is not smaller."""
    return float(-(-(number - 1) // 2) * 2 + 1)


def carried_quantizers(recording: Recording, placement: Placement) -> dict[int, int]:
    """Return the quantizer that every reader of a value sees, by the value's number."""
    return {
        value.index: placement.outputs[operation.key]
        for operation in recording.operations
        if operation.key in placement.outputs
        for value in operation.outputs
    }


def output_quantizers(recording: Recording, placement: Placement) -> dict[CallKey, int]:
    """Return the quantizer right behind each call, or behind the activation function that follows it alone."""
    carried = carried_quantizers(recording, placement)
    found = {operation.key: behind(operation, carried) for operation in recording.operations}
    consumers = recording.consumers()
    for operation in recording.operations:
        readers = consumers.get(operation.outputs[0].index, []) if operation.outputs else []
        if found[operation.key] is None and len(readers) == 1 and len(operation.outputs) == 1:
            reader = readers[0][0]
            if reader.key.operation in _BOUNDED | {"relu", "relu_"} and len(reader.inputs) == 1:
                found[operation.key] = behind(reader, carried)
    return {key: number for key, number in found.items() if number is not None}


def behind(operation: Operation, carried: dict[int, int]) -> int | None:
    """Return the quantizer on an operation's only output, if there is one."""
    return carried.get(operation.outputs[0].index) if len(operation.outputs) == 1 else None
