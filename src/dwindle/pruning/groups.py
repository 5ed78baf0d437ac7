"""Sets of units: which blocks of which targets stay or go together.

Three sources: a target alone, a ``dependency_group_id`` of the config, or the axes that an analysis of the model
found (channels of residual branches, of depthwise convolutions, heads of attention).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwindle.config import Target
from dwindle.pruning.coupling import Coupling
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.sparsity import RankedUnits, choose, pattern_keep, smallest


@dataclass
class UnitSet:
    """Units and the blocks that belong to them.

    Attributes:
        units: What is ranked.
        members: For each target, the unit of each of its blocks (-1 is none); None when they are the same.
        axis: The axis of the analysis, when it comes from one.
    """

    units: RankedUnits
    members: dict[Target, Tensor | None]
    axis: Any = None


@dataclass(frozen=True)
class MaskedAxis:
    """An axis of the analysis after the choice.

    Attributes:
        axis: The axis.
        keep: Which of its indices stay.
        ranked: Parameters and dimensions that took part in the ranking.
        name: Their names, for reports.
    """

    axis: Any
    keep: Tensor
    ranked: set[tuple[str, int]]
    name: str


def unit_sets(
    goals: Mapping[Target, PlannedTarget],
    metrics: Mapping[Target, Tensor],
    *,
    progress: float = 1.0,
    coupling: Coupling | None = None,
) -> tuple[list[UnitSet], list[str]]:
    """Return the sets of units of all targets, and notes for the user.

    Args:
        goals: The targets.
        metrics: One value for each block of each target.
        progress: Ratios and thresholds are multiplied by it (schedules).
        coupling: What an analysis of the model found; None couples nothing.
    """
    rest = {target: planned for target, planned in goals.items() if planned.granularity.kind != "pattern"}
    sets: list[UnitSet] = []
    groups: dict[int | str, list[PlannedTarget]] = {}
    for target, planned in list(rest.items()):
        if planned.setting.dependency_group_id is not None:
            groups.setdefault(planned.setting.dependency_group_id, []).append(planned)
            del rest[target]
    for group, members in groups.items():
        metric = torch.stack([metrics[planned.target].float() for planned in members]).mean(0)
        own: dict[Target, Tensor | None] = {planned.target: None for planned in members}
        elements = sum(planned.block_size for planned in members)
        sets.append(UnitSet(_units(f"dependency group {group!r}", members, metric, elements, progress), own))
    notes: list[str] = []
    if coupling is not None:
        coupled, notes = _axis_sets(rest, metrics, progress, coupling)
        sets += coupled
    for target, planned in rest.items():
        units = _units(str(target), [planned], metrics[target], planned.block_size, progress)
        sets.append(UnitSet(units, {target: None}))
    return sets, notes


def _units(
    name: str, members: Sequence[PlannedTarget], metric: Tensor, elements: int, progress: float
) -> RankedUnits:
    """Return the ranking that the settings of all members allow: the smallest ratio, the tightest bounds."""
    settings = [planned.setting for planned in members]
    ratios = [setting.goal for setting in settings if setting.goal is not None]
    thresholds = [setting.sparse_threshold for setting in settings if setting.sparse_threshold is not None]
    if len(set(ratios)) > 1:
        listed = ", ".join(f"{planned.target} {planned.setting.goal:g}" for planned in members[:4])
        warnings.warn(
            f"{name}: targets that go together ask for different ratios ({listed}); {min(ratios):g} is used",
            stacklevel=2,
        )
    lows = [setting.min_sparse_ratio for setting in settings if setting.min_sparse_ratio is not None]
    highs = [setting.max_sparse_ratio for setting in settings if setting.max_sparse_ratio is not None]
    group = next((own.global_group_id for own in settings if own.global_group_id is not None), None)
    return RankedUnits(
        name=name,
        metric=metric,
        elements=elements,
        ratio=min(ratios) * progress if ratios else None,
        threshold=min(thresholds) * progress if thresholds and not ratios else None,
        minimum=max(lows) * progress if lows else None,
        maximum=min(highs) if highs else None,
        parts=math.lcm(*(setting.internal_metric_block or 1 for setting in settings)),
        group=group,
    )


def unit_counts(sets: Sequence[UnitSet]) -> dict[Target, int]:
    """Return for each target the smallest number of units (in one part) among which was chosen for it."""
    counts: dict[Target, int] = {}
    for unit_set in sets:
        number = max(unit_set.units.count // unit_set.units.parts, 1)
        for target in unit_set.members:
            counts[target] = min(counts.get(target, number), number)
    return counts


def _axis_sets(
    rest: dict[Target, PlannedTarget], metrics: Mapping[Target, Tensor], progress: float, coupling: Coupling
) -> tuple[list[UnitSet], list[str]]:
    """Take the targets that lie on axes out of ``rest`` and return the sets of those axes, with notes."""
    by_axis: dict[Any, dict[Target, Tensor]] = {}
    planned_of = dict(rest)
    notes: list[str] = []
    for target, planned in planned_of.items():
        blocks = planned.granularity
        if blocks.kind != "channel" or blocks.groups != 1 or not coupling.knows(target):
            continue
        members, reason = coupling.axes_of(target, blocks.axis % len(planned.shape))
        if not members and reason is None:
            continue  # nothing is known of it: it is ranked alone
        del rest[target]
        for info, index in members:
            by_axis.setdefault(info, {})[target] = index
        if reason is not None:
            notes.append(f"{target}: channels stay, because of {reason}")
    sets = []
    for info in sorted(by_axis, key=lambda info: info.id):
        members_of = by_axis[info]
        held = coupling.held_by(info, members_of)
        if held is not None:
            listed = ", ".join(map(str, members_of))
            notes.append(f"{listed}: channels stay, because {held} goes with them and is excluded")
            continue
        unwanted = next((t for t in members_of if not _allows(planned_of[t].setting.axes, info.kind)), None)
        if unwanted is not None:
            notes.append(
                f"{unwanted}: {info.kind} stay, because its axes are {planned_of[unwanted].setting.axes}"
            )
            continue
        metric, elements = _axis_metric(info.size, members_of, planned_of, metrics)
        name = " + ".join(map(str, list(members_of)[:3])) + (" + ..." if len(members_of) > 3 else "")
        units = _units(name, [planned_of[target] for target in members_of], metric, elements, progress)
        sets.append(UnitSet(units, dict(members_of), info))
    return sets, notes


def _allows(axes: Sequence[str] | None, kind: str) -> bool:
    return axes is None or kind in axes


def _axis_metric(
    size: int,
    members: Mapping[Target, Tensor],
    planned: Mapping[Target, PlannedTarget],
    metrics: Mapping[Target, Tensor],
) -> tuple[Tensor, int]:
    """Return the mean metric of each index of an axis over its members, and the weights that one index removes."""
    total = torch.zeros(size)
    elements = 0
    for target, index in members.items():
        here = index >= 0
        total.index_add_(0, index[here], metrics[target].detach().float().cpu()[here])
        elements += planned[target].block_size * int(here.sum())
    return total / len(members), max(elements // size, 1)


def _at_least(kept: Tensor, metric: Tensor, minimum: int, multiple: int) -> Tensor:
    """Keep more units until there are ``minimum``, and a multiple of ``multiple`` where there are that many."""
    count, size = int(kept.sum()), kept.numel()
    wanted = max(count, min(minimum, size))
    wanted = min(size, -(-wanted // multiple) * multiple) if size >= multiple else size
    return kept if wanted == count else ~smallest(metric, size - wanted)


def selected(
    sets: Sequence[UnitSet],
    goals: Mapping[Target, PlannedTarget],
    metrics: Mapping[Target, Tensor],
    *,
    progress: float = 1.0,
    coupling: Coupling | None = None,
) -> tuple[dict[Target, Tensor], list[MaskedAxis]]:
    """Return which blocks of each target stay, and for each axis which indices stay.

    Args:
        sets: The units.
        goals: The targets.
        metrics: One value for each block of each target.
        progress: In an N:M pattern this share of the ``M - N`` that shall go, rounded down, goes (schedules).
        coupling: Corrects the counts of axes whose sizes must agree with others.
    """
    kept = choose([unit_set.units for unit_set in sets])
    multiples, may_vanish = {}, set()
    for position, unit_set in enumerate(sets):
        settings = [goals[target].setting for target in unit_set.members]
        multiple = math.lcm(*(setting.round_to for setting in settings))
        least = max(setting.minimum for setting in settings)
        if unit_set.axis is not None and coupling is not None:
            multiple = coupling.count_step(unit_set.axis, multiple)
        kept[position] = _at_least(kept[position], unit_set.units.metric, least, multiple)
        if unit_set.axis is not None:
            multiples[unit_set.axis.axis] = multiple
            if all(setting.max_sparse_ratio == 1 for setting in settings):  # asked for in so many words
                may_vanish.add(unit_set.axis.axis)
    axes = []
    if coupling is not None:
        wanted = {
            s.axis.axis: int(own.sum()) for s, own in zip(sets, kept, strict=True) if s.axis is not None
        }
        solved = coupling.solved(wanted, multiples)
        solved |= {axis: 0 for axis in may_vanish if wanted[axis] == 0}
        for position, unit_set in enumerate(sets):
            if unit_set.axis is None:
                continue
            allowed = unit_set.units.count - solved[unit_set.axis.axis]
            if allowed < int((~kept[position]).sum()):
                kept[position] = ~smallest(unit_set.units.metric, allowed)
            ranked = {
                (coupling.path_of(target), goals[target].granularity.axis % len(goals[target].shape))
                for target in unit_set.members
            }
            axes.append(MaskedAxis(unit_set.axis, kept[position], ranked, unit_set.units.name))
    keep: dict[Target, Tensor] = {}
    for target, planned in goals.items():
        blocks = planned.granularity
        if blocks.kind == "pattern":
            stays = blocks.window - int((blocks.window - blocks.keep) * progress)
            keep[target] = pattern_keep(metrics[target], blocks.axis, stays, blocks.window)
        else:
            shape = blocks.block_shape(planned.shape)
            keep[target] = torch.ones(shape, dtype=torch.bool, device=metrics[target].device)
    for unit_set, own in zip(sets, kept, strict=True):
        for target, index in unit_set.members.items():
            here = keep[target]
            if index is None:
                keep[target] = here & own.reshape(here.shape).to(here.device)
            else:
                keep[target] = here & (own.cpu()[index.clamp(min=0)] | (index < 0)).to(here.device)
    return keep, axes
