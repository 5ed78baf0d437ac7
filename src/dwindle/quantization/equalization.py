"""Cross-layer equalization: the ranges of a channel in the layer that makes it and in those that read it become equal.

A channel with small weights in one layer and large ones in the next wastes levels of both. Where the scale of a
channel is free (:mod:`dwindle.quantization.free_scales`) it is chosen so that the largest weight that makes the
channel equals the largest weight that reads it, again and again over all layers until nothing moves (Nagel et al. 2019,
arXiv 1906.04721, section 4.1). The float model stays the same function; no data are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwindle.quantization.free_scales import FreeScales

ROUNDS = 100
TOLERANCE = 1e-4
"""Rounds end when no factor of a round is further from 1 than this."""
LARGEST_FACTOR = 1e5
"""Channels of hardly any range are moved no further than this, either way."""


def equalizing_factors(made: Tensor, read: Tensor) -> Tensor:
    """Return by what to multiply channels so that both ranges become ``sqrt(made * read)``.

    Args:
        made: float64, largest magnitude among the weights that make each channel.
        read: float64, largest magnitude among those that read it; they are divided by the factor.

    Returns:
        ``sqrt(read / made)``; 1 where a range is zero, for such a channel has nothing to equalize.
    """
    usable = (made > 0) & (read > 0)
    ratio = torch.where(usable, read, 1.0) / torch.where(usable, made, 1.0)
    return ratio.sqrt()


def channel_ranges(weight: Tensor, units: Tensor, count: int) -> Tensor:
    """Return the largest magnitude of a weight's elements by unit, float64, zero where there are none.

    Args:
        weight: Any shape.
        units: int64, broadcastable to it: the unit of each element.
        count: Number of units.
    """
    found = torch.zeros(count, dtype=torch.float64)
    values = weight.detach().double().abs().cpu().reshape(-1)
    return found.scatter_reduce(0, units.expand(weight.shape).reshape(-1), values, "amax")


def equalize(model: nn.Module, scales: FreeScales) -> dict[str, Tensor]:
    """Equalize all layers of a model in place.

    Args:
        model: Its batch normalizations are folded already.
        scales: Its free scales.

    Returns:
        By name what each changed parameter was multiplied by, broadcastable to it.
    """
    weights = {name: ids for name, ids in scales.made.items() if _is_weight(model, scales, name)}
    total = torch.ones(scales.count, dtype=torch.float64)
    groups = _groups(weights, scales)
    ranges = _Ranges(model, weights, scales)
    for _ in range(ROUNDS):
        moved = 0.0
        for group in groups:
            factors = torch.ones(scales.count, dtype=torch.float64)
            factors[group] = equalizing_factors(*ranges.of(group, total))
            total *= factors
            moved = max(moved, float(factors.log().abs().max()))
        if moved < TOLERANCE:
            break
    return scales.apply(model, total.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR))


def _is_weight(model: nn.Module, scales: FreeScales, name: str) -> bool:
    return name not in scales.norms and model.get_parameter(name).dim() > 1


def _groups(weights: dict[str, Tensor], scales: FreeScales) -> list[Tensor]:
    """Return the units in groups that are made by the same weights; one group is moved at a time."""
    first = torch.full((scales.count,), -1)
    for number, ids in enumerate(weights.values()):
        own = ids.reshape(-1)
        own = own[first[own] < 0]
        first[own] = number
    first[0] = -1
    return [own for number in range(len(weights)) if (own := (first == number).nonzero().reshape(-1)).numel()]


class _Ranges:
    """Ranges of channels while factors change; the weights themselves are read once for each pair of units.

    The largest magnitude is kept for every pair of a unit that is made and one that is read: a weight's ranges under
    any factors follow from these.
    """

    def __init__(self, model: nn.Module, weights: dict[str, Tensor], scales: FreeScales) -> None:
        self.count = scales.count
        made, read, values = [], [], []
        zero = torch.zeros((), dtype=torch.int64)
        for name in {**weights, **scales.read}:
            weight = model.get_parameter(name).detach().double().abs().cpu()
            rows, columns = weights.get(name, zero), scales.read.get(name, zero)
            pairs = (rows * scales.count + columns).expand(weight.shape).reshape(-1)
            found, where = pairs.unique(return_inverse=True)
            largest = torch.zeros(len(found), dtype=torch.float64)
            values.append(largest.scatter_reduce(0, where, weight.reshape(-1), "amax"))
            made.append(found // scales.count)
            read.append(found % scales.count)
        empty = [torch.zeros(0, dtype=torch.int64)]
        self.made, self.read = torch.cat([*made, *empty]), torch.cat([*read, *empty])
        self.values = torch.cat([*values, torch.zeros(0, dtype=torch.float64)])
        self.touching: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, group: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of made and reading weights of some units, under the factors so far."""
        key = int(group[0])
        if key not in self.touching:
            chosen = torch.zeros(self.count, dtype=torch.bool)
            chosen[group] = True
            self.touching[key] = (
                chosen[self.made].nonzero().reshape(-1),
                chosen[self.read].nonzero().reshape(-1),
            )
        result = []
        for index, units in zip(self.touching[key], (self.made, self.read), strict=True):
            values = self.values[index] * factors[self.made[index]] / factors[self.read[index]]
            ranges = torch.zeros(self.count, dtype=torch.float64)
            result.append(ranges.scatter_reduce(0, units[index], values, "amax")[group])
        return result[0], result[1]
