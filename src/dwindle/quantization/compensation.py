"""Rounding that makes up for its own errors: GPTQ's columns, on the int8 levels of quantization after training.

What matters is not how far each weight moves but how far a layer's output does. Where the inputs of a layer go
together, as behind the norms of a transformer, the error of one weight can be taken on by others: columns are
rounded one after the other, those with the largest inputs first, and the later ones make up for what the earlier
ones lost (Frantar et al. 2022, arXiv 2210.17323). No step of training, no label; the inputs are those that the
layer's own quantizer rounds. What is zero stays zero, no scale changes, and where a part of the data that was not
used sees no gain, a row keeps its nearest levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.levels import spread_over
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.padding import PADDING_MASK, padding_mask, real_tokens
from dwindle.quantization.reconstruction_blocks import own_weights
from dwindle.quantization.simulation import PlacedMode, Simulation, SimulationMode
from dwindle.training.inputs import Inputs
from dwindle.training.linear_layers import (
    from_matrix,
    inverse_factor,
    is_linear_layer,
    sums_of_products,
    to_matrix,
)
from dwindle.training.progress import tracked

_STRIPE = 128
_TOGETHER = 1 << 26
"""Sums of products that are kept at a time hold at most so many numbers; more layers take more passes."""
_PAIR_LIMIT = 128
_CHECKED_SHARE = 4
"""Of so many batches one is kept to check on."""


@dataclass(frozen=True)
class Compensated:
    """What compensation brought for one layer, as shares of the energy of its output on data that was not used.

    Attributes:
        name: The weight.
        nearest: Error of the nearest levels.
        compensated: Error of the levels that are kept.
    """

    name: str
    nearest: float
    compensated: float


def compensated_levels(
    weight: Tensor, scale: Tensor, zero: Tensor, products: Tensor, form: NumberFormat, damping: float = 0.01
) -> Tensor:
    """Return levels whose product with the inputs is near that of the weight.

    Args:
        weight: ``[rows, columns]``, floating; entries of zero stay zero.
        scale: Of the same dtype, broadcastable to the weight.
        zero: Zero points, likewise.
        products: ``X' X`` of the inputs, ``[columns, columns]``, of the same dtype.
        form: The levels.
        damping: Share of the mean of the diagonal that is added to the diagonal.

    Returns:
        ``[rows, columns]`` integers in the dtype of the weight.
    """
    lowest, highest = _allowed(weight, scale, zero, form)
    order = products.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(products[order][:, order], damping)
    every = (weight, scale, zero, lowest, highest, (weight == 0).to(weight.dtype))
    rest, scale, zero, lowest, highest, fixed = (
        part.expand_as(weight).t()[order].contiguous() for part in every
    )
    levels, count = torch.empty_like(rest), len(rest)
    for begin in range(0, count, _STRIPE):
        end = min(begin + _STRIPE, count)
        part, errors = rest[begin:end], torch.empty_like(rest[begin:end])
        own = factor[begin:end, begin:end]
        for i in range(end - begin):
            at = begin + i
            level = (part[i] / scale[at]).round_().add_(zero[at])
            level = torch.minimum(torch.maximum(level, lowest[at]), highest[at])
            level = torch.where(fixed[at] > 0, zero[at], level)
            levels[at] = level
            errors[i] = (part[i] - (level - zero[at]) * scale[at]) / own[i, i]
            part[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        rest[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(levels).index_copy_(0, order, levels)
    return result.t().contiguous()


def nearest_levels(weight: Tensor, scale: Tensor, zero: Tensor, form: NumberFormat) -> Tensor:
    """Return the nearest levels; shapes as in :func:`compensated_levels`."""
    return ((weight / scale).round() + zero).clamp(form.lowest, form.highest)


def _allowed(weight: Tensor, scale: Tensor, zero: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest level of each entry.

    Where no two nearest levels of a row add up to more than 128 (see
    :func:`dwindle.quantization.weights.weight_scale`), none do afterwards: the largest stays below itself or 64, the
    others below the rest.
    """
    zero = zero.expand_as(weight)
    nearest = nearest_levels(weight, scale, zero, form) - zero
    edges = []
    for sign in (-1, 1):
        side = (nearest * sign).clamp(min=0)
        pair = torch.topk(side, min(2, side.shape[1]), dim=1).values
        bounded = pair.sum(1, keepdim=True) <= _PAIR_LIMIT
        top = pair[:, :1]
        most = torch.maximum(side, (_PAIR_LIMIT - top).clamp(max=_PAIR_LIMIT // 2).expand_as(side))
        edges.append(torch.where(bounded & (form.bits == 8), most, torch.inf) * sign + zero)
    return edges[0].clamp(min=form.lowest), edges[1].clamp(max=form.highest)


class _Products(PlacedMode):
    """Runs in float and sums up products of the rounded inputs of some layers."""

    def __init__(
        self, simulation: Simulation, parameters: tuple[Tensor, ...], layers: dict[CallKey, nn.Module]
    ) -> None:
        super().__init__(simulation)
        self.rounding = SimulationMode(simulation, parameters)
        self.layers = layers
        self.sums: dict[CallKey, Tensor] = {}
        self.real: Tensor | None = None

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the input, then run the call."""
        layer = self.layers.get(key)
        if layer is not None:
            index, keyword = (1, "mat1") if key.operation == "addmm" else (0, "input")
            value = args[index] if len(args) > index else kwargs[keyword]
            quantizer = self.simulation.slots[key].place.input_quantizer
            value = real_tokens(value, self.real) if isinstance(layer, nn.Linear) else value
            found, _ = sums_of_products(layer, self.rounding.activation(value, quantizer))
            self.sums[key] = found if key not in self.sums else self.sums[key].add_(found)
        return super().on_call(key, func, args, kwargs)


def compensate(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Sequence[Inputs],
    padding: str | None = PADDING_MASK,
) -> list[Compensated]:
    """Set the weights of all linear layers and convolutions on compensated levels, in place.

    Args:
        model: The model, not simulating yet, in evaluation mode.
        simulation: Where its quantizers stand.
        parameters: The packed scales and zero points.
        batches: Data without labels. Of four or more batches every fourth is kept to check on; levels that pass are
            made once more of all of the data.
        padding: The argument that tells padding from real tokens.

    Returns:
        What it brought, layer by layer. Weights that several calls read, and those of other operators, stay as they
        are.
    """
    checked = [batch for number, batch in enumerate(batches) if number % _CHECKED_SHARE == _CHECKED_SHARE - 1]
    used = [batch for number, batch in enumerate(batches) if number % _CHECKED_SHARE != _CHECKED_SHARE - 1]
    results, rounded = [], {}
    parts = list(_parts(_layers(model, simulation)))
    for part in tracked(parts, "compensated rounding: layers"):
        sums = _sums(model, simulation, parameters, part, used, padding)
        checks = _sums(model, simulation, parameters, part, checked, padding) if checked else sums
        for key, layer in part.items():
            if key not in sums or key not in checks:
                continue
            weight, result = _layer(layer, simulation, parameters, key, sums[key], checks[key])
            rounded[simulation.slots[key].place.name] = weight
            results.append(result)
    with torch.no_grad():
        for name, weight in rounded.items():
            model.get_parameter(name).copy_(weight)
    return results


def _layers(model: nn.Module, simulation: Simulation) -> dict[CallKey, nn.Module]:
    found = {}
    for key, name in own_weights(model, simulation).items():
        layer = model.get_submodule(key.module)
        zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
        if is_linear_layer(layer) and zeros and name == f"{key.module}.weight":
            found[key] = layer
    return found


def _parts(layers: dict[CallKey, nn.Module]) -> Iterator[dict[CallKey, nn.Module]]:
    part: dict[CallKey, nn.Module] = {}
    size = 0
    for key, layer in layers.items():
        matrix = to_matrix(layer, layer.weight)  # type: ignore[arg-type]
        own = matrix.shape[0] * matrix.shape[2] ** 2
        if part and size + own > _TOGETHER:
            yield part
            part, size = {}, 0
        part[key] = layer
        size += own
    if part:
        yield part


def _sums(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    layers: dict[CallKey, nn.Module],
    batches: Sequence[Inputs],
    padding: str | None,
) -> dict[CallKey, Tensor]:
    mode = _Products(simulation, parameters, layers)
    for args, kwargs in batches:
        mode.counts.clear()
        mode.real = padding_mask(kwargs, padding)
        run_with(model, mode, args, kwargs)
    return mode.sums


def _layer(
    layer: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    key: CallKey,
    products: Tensor,
    checks: Tensor,
) -> tuple[Tensor, Compensated]:
    """Return the rounded weight of one layer, and what that brought."""
    slot = simulation.slots[key]
    place, part = slot.place, slice(slot.start, slot.start + slot.length)
    weight = layer.weight.detach()  # type: ignore[operator,union-attr]
    full = [
        spread_over(own[part].double(), weight, place.axis, place.block).expand_as(weight)
        for own in (parameters[2], parameters[3])
    ]
    scales, zeros = (to_matrix(layer, own) for own in full)
    matrix, rows, energy = to_matrix(layer, weight).double(), [], [0.0, 0.0, 0.0]
    for group, own in enumerate(matrix):
        scale, zero, form = scales[group], zeros[group], place.form
        check = checks[group].double()
        nearest = (nearest_levels(own, scale, zero, form) - zero) * scale
        levels = compensated_levels(own, scale, zero, products[group].double(), form)
        better = (levels - zero) * scale
        before, after = _energies(nearest - own, check), _energies(better - own, check)
        kept = after < before
        for place_, value in enumerate((before, torch.where(kept, after, before), _energies(own, check))):
            energy[place_] += float(value.sum())
        if checks is not products and bool(kept.any()):  # what the check has shown holds for all of the data
            whole = products[group].double() + check
            better = (compensated_levels(own, scale, zero, whole, form) - zero) * scale
        rows.append(torch.where(kept[:, None], better, nearest))
    result = from_matrix(layer, torch.stack(rows), weight.shape).to(weight.dtype)
    total = max(energy[2], 1e-300)
    return result, Compensated(place.name, energy[0] / total, energy[1] / total)


def _energies(rows: Tensor, products: Tensor) -> Tensor:
    """Return ``r X' X r'`` for each row r."""
    return ((rows @ products) * rows).sum(1)


__all__ = ["Compensated", "compensate", "compensated_levels", "nearest_levels"]
