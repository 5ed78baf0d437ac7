"""Which units stay: from metrics and goals to keep-vectors, as pure functions of tensors.

A *unit* is what stays or goes as a whole: a block of one target, or blocks of several targets that depend on each
other. Units with smaller metrics go first; the earlier one wins a tie, so a result never depends on the machine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dwindle.config.errors import ConfigError, DwindleError

#: From this many values on, an order statistic is narrowed down with a sample of this size.
_MANY, _SAMPLE = 1_000_000, 1 << 16


@dataclass(frozen=True)
class RankedUnits:
    """Units that are ranked against each other, and how many of them shall go.

    Attributes:
        name: What they belong to, for messages.
        metric: One value for each unit, any shape; larger is more important.
        elements: Number of weights that one unit removes.
        ratio: Share of the units that goes.
        threshold: Units below it go, in place of a ratio.
        minimum: At least this share goes.
        maximum: At most this share goes; None is no bound, but in a global ranking one unit always stays.
        parts: Equal parts of the units that each lose the same share.
        group: Units with the same id are ranked together.
    """

    name: str
    metric: Tensor
    elements: int = 1
    ratio: float | None = None
    threshold: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    parts: int = 1
    group: int | str | None = None

    @property
    def count(self) -> int:
        """Number of units."""
        return self.metric.numel()

    def bounds(self) -> tuple[int, int]:
        """Return how many units must go at least and may go at most."""
        low = 0 if self.minimum is None else math.ceil(self.count * self.minimum - 1e-9)
        high = self.count if self.maximum is None else math.floor(self.count * self.maximum + 1e-9)
        return min(low, high), high


def share_of(count: int, ratio: float) -> int:
    """Return how many of ``count`` a ratio means: rounded down, but not by the last bit of a product.

    In binary 0.7 of 170 is a little less than 119, which is meant.
    """
    return math.floor(count * ratio * (1 + 1e-12) + 1e-9)


def smallest(values: Tensor, count: int) -> Tensor:
    """Return which ``count`` values are the smallest, as a boolean tensor of the same shape.

    The time grows with the number of values only (selection, not sorting); of equal values the first go.

    Args:
        values: Floating point, any shape.
        count: How many.
    """
    flat = values.reshape(-1)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(values, dtype=torch.bool)
    border = _order_statistic(flat, count)
    chosen = flat < border
    missing = count - int(torch.count_nonzero(chosen))
    ties = (flat == border).nonzero().reshape(-1)
    chosen[ties[:missing]] = True
    return chosen.reshape(values.shape)


def _order_statistic(flat: Tensor, count: int) -> Tensor:
    """Return the ``count``-th smallest value (counted from 1).

    Of many values a sample tells a narrow range that holds the answer with near certainty; only what lies in the
    range is looked at closely. When the range does not hold it, everything is.
    """
    if flat.numel() > _MANY:
        picks = torch.randint(flat.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        sample = flat[picks.to(flat.device)].sort().values
        place, slack = count * _SAMPLE // flat.numel(), 4 * math.isqrt(_SAMPLE)
        low = sample[max(place - slack, 0)]
        high = sample[min(place + slack, _SAMPLE - 1)]
        below = int(torch.count_nonzero(flat < low))
        inside = flat[(flat >= low) & (flat <= high)]
        if below < count <= below + inside.numel():
            return _order_statistic_of_all(inside, count - below)
    return _order_statistic_of_all(flat, count)


def _order_statistic_of_all(flat: Tensor, count: int) -> Tensor:
    if flat.device.type != "cpu":
        return flat.float().kthvalue(count).values.to(flat.dtype)
    array = (flat if flat.dtype in (torch.float32, torch.float64) else flat.float()).numpy()
    return torch.from_numpy(np.partition(array, count - 1)[count - 1 : count]).to(flat.dtype)


def pattern_keep(metric: Tensor, axis: int, keep: int, window: int) -> Tensor:
    """Return which elements an N:M pattern keeps: the ``keep`` largest of every ``window`` neighbours.

    Args:
        metric: One value for each element.
        axis: Dimension along which neighbours are counted; a multiple of ``window``.
        keep: N.
        window: M.

    Returns:
        A boolean tensor of the metric's shape.
    """
    last = metric.movedim(axis, -1)
    windows = last.reshape(*last.shape[:-1], -1, window)
    order = windows.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    kept = torch.zeros_like(windows, dtype=torch.bool).scatter_(-1, order, True)
    return kept.reshape(last.shape).movedim(-1, axis)


def choose(sets: Sequence[RankedUnits]) -> list[Tensor]:
    """Return which units stay.

    Args:
        sets: Sets of units. Those with a threshold come first, then those with a group id, which are ranked
            together, then those with a ratio of their own. A set with no goal keeps everything.

    Returns:
        For each set a boolean tensor of its metric's shape: True stays.

    Raises:
        ConfigError: Sets of one group ask for different ratios.
        DwindleError: A metric is not a number.
    """
    kept: dict[int, Tensor] = {}
    groups: dict[int | str, list[int]] = {}
    for position, units in enumerate(sets):
        if bool(torch.isnan(units.metric).any()):
            raise DwindleError(f"the metric of {units.name} is not a number (NaN): are its weights finite?")
        if units.threshold is not None:
            kept[position] = _by_threshold(units)
        elif units.group is not None and units.ratio is not None:
            groups.setdefault(units.group, []).append(position)
        else:
            kept[position] = _by_ratio(units)
    for group, positions in groups.items():
        for position, keep in zip(positions, _by_group(group, [sets[p] for p in positions]), strict=True):
            kept[position] = keep
    return [kept[position] for position in range(len(sets))]


def _by_threshold(units: RankedUnits) -> Tensor:
    low, high = units.bounds()
    gone = units.metric < (units.threshold or 0.0)
    count = int(torch.count_nonzero(gone))
    return ~gone if low <= count <= high else ~smallest(units.metric, min(max(count, low), high))


def _by_ratio(units: RankedUnits) -> Tensor:
    if units.ratio is None:
        return torch.ones_like(units.metric, dtype=torch.bool)
    low, high = units.bounds()
    if units.parts == 1:
        return ~smallest(units.metric, min(max(share_of(units.count, units.ratio), low), high))
    if units.count % units.parts:
        raise ConfigError(
            f"{units.name}: internal_metric_block {units.parts} does not divide its {units.count} blocks"
        )
    size = units.count // units.parts
    count = min(max(share_of(size, units.ratio), -(-low // units.parts)), high // units.parts)
    parts = units.metric.reshape(units.parts, size)
    order = parts.argsort(dim=1, stable=True)[:, :count]
    gone = torch.zeros_like(parts, dtype=torch.bool).scatter_(1, order, True)
    return ~gone.reshape(units.metric.shape)


def _by_group(group: int | str, sets: list[RankedUnits]) -> list[Tensor]:
    """Rank the units of several sets together; the ratio counts weights, the bounds of each set hold.

    What the bounds decide is taken out first: the least important units that must go, and the most important
    that must stay. The others share one ranking.
    """
    ratios = {units.ratio for units in sets}
    if len(ratios) > 1:
        shown = ", ".join(f"{units.name}: {units.ratio:g}" for units in sets[:4])
        raise ConfigError(f"global_group_id {group!r}: all targets need the same sparse_ratio ({shown})")
    ratio = sets[0].ratio or 0.0
    goal = share_of(sum(units.count * units.elements for units in sets), ratio)
    limits = [_limits(units, ratio) for units in sets]
    unbounded = _ranked(sets, [None] * len(sets), goal)
    counts = [int(torch.count_nonzero(gone)) for gone in unbounded]
    if all(low <= count <= high for count, (low, high) in zip(counts, limits, strict=True)):
        return [~gone.reshape(units.metric.shape) for gone, units in zip(unbounded, sets, strict=True)]
    forced, free = [], []
    for units, (low, high) in zip(sets, limits, strict=True):
        metric = units.metric.reshape(-1)
        gone = smallest(metric, min(low, high))
        stays = smallest(-metric, units.count - high)
        forced.append(gone)
        free.append(~(gone | stays))
    rest = goal - sum(
        int(torch.count_nonzero(gone)) * units.elements for gone, units in zip(forced, sets, strict=True)
    )
    chosen = _ranked(sets, free, rest)
    kept = [
        ~(gone | also).reshape(units.metric.shape)
        for units, gone, also in zip(sets, forced, chosen, strict=True)
    ]
    removed = sum(
        int(torch.count_nonzero(~keep)) * units.elements for keep, units in zip(kept, sets, strict=True)
    )
    largest = max(units.elements for units in sets)
    if abs(goal - removed) >= largest:
        warnings.warn(
            f"global_group_id {group!r}: {removed} weights go instead of {goal}, because of min_sparse_ratio and "
            f"max_sparse_ratio of its targets",
            stacklevel=2,
        )
    return kept


def _limits(units: RankedUnits, ratio: float) -> tuple[int, int]:
    """Return the bounds of a set in a global ranking: one unit stays, unless everything or ``maximum`` says else."""
    low, high = units.bounds()
    if units.maximum is None and ratio < 1 and units.count > 1:
        high = units.count - 1  # a layer that is gone altogether is no pruned layer
    return low, high


def _ranked(sets: list[RankedUnits], free: Sequence[Tensor | None], rest: int) -> list[Tensor]:
    """Return which of the free units (None: all) go, so that together they remove at most ``rest`` weights."""
    pools = [
        units.metric.reshape(-1) if own is None else units.metric.reshape(-1)[own]
        for units, own in zip(sets, free, strict=True)
    ]
    pooled = torch.cat(pools) if len(pools) > 1 else pools[0]
    sizes = {units.elements for units in sets}
    if len(sizes) == 1:
        gone = smallest(pooled, max(rest, 0) // sizes.pop())
    else:
        weights = torch.cat(
            [torch.full((pool.numel(),), units.elements) for units, pool in zip(sets, pools, strict=True)]
        )
        order = pooled.cpu().argsort(stable=True)
        gone = torch.zeros(pooled.numel(), dtype=torch.bool)
        gone[order[: int(torch.count_nonzero(weights[order].cumsum(0) <= rest))]] = True
        gone = gone.to(pooled.device)
    result = []
    for units, own, chosen in zip(sets, free, gone.split([pool.numel() for pool in pools]), strict=True):
        if own is None:
            result.append(chosen)
            continue
        whole = torch.zeros(units.count, dtype=torch.bool, device=own.device)
        whole[own] = chosen
        result.append(whole)
    return result
