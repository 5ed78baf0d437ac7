"""From a wish and the axes of a model to what goes: indices of axes, whole blocks, whole experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle.graph.analysis import Analysis, AxisInfo
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts, CountSolver, Multiple
from dwindle.graph.rounding import count_steps
from dwindle.pruning.shared_axes import shared_axes
from dwindle.realize.choose import (
    best_indices,
    counts_for_target,
    fewest,
    global_counts,
    local_counts,
    scores_by_axis,
)
from dwindle.realize.choose_blocks import named_blocks, select_blocks
from dwindle.realize.cost import CostModel
from dwindle.realize.experts import choose_experts, left_mixtures
from dwindle.realize.named_axes import counts_by_name
from dwindle.realize.priced_counts import counts_by_price
from dwindle.realize.shrink import Keep
from dwindle.realize.surgery import _held, tensor_slots
from dwindle.realize.uniform import Uniformity
from dwindle.realize.wish import Wish

#: How often indices are chosen anew because the config would not describe them.
_MOST_TRIES = 6


@dataclass(slots=True)
class Selection:
    """What goes.

    Attributes:
        keep: Which indices of each axis that shrinks stay.
        blocks: Residual blocks that go.
        experts: Experts that go.
        solver: The constraints that the counts satisfy.
    """

    keep: Keep
    blocks: list[Any]
    experts: list[Any]
    solver: CountSolver

    @property
    def is_empty(self) -> bool:
        """Whether nothing goes."""
        return not self.keep and not self.blocks and not self.experts


def select(model: nn.Module, analysis: Analysis, wish: Wish) -> Selection:
    """Choose what goes. The model is not changed.

    Args:
        model: The model.
        analysis: Its axes.
        wish: How much of what may go.

    Raises:
        ConfigError: The target of the wish cannot be reached, or the data of its importance do not fit.
        DwindleError: A loss or a statistic of its importance is not finite.
    """
    infos = [info for info in analysis.selected() if wish.wants(info)]
    uniformity = Uniformity(model, analysis) if wish.uniform else None
    if uniformity is not None:
        able = [info for info in analysis.selected() if wish.wants(info, any_kind=True)]
        infos = uniformity.joined(infos, able)
    tensors = {name: _held(*holders[0]) for name, holders in tensor_slots(model).items()}
    axes = shared_axes(model, analysis, infos)
    if wish.importance.needs_data:
        whole = wish.asks_for("block") or wish.asks_for("expert")
        wish.importance.measure(model, axes, wish.data, wish.loss, weights=whole)
    blocks = _blocks(model, analysis, wish, tensors, alone=not infos)
    gone = tuple(f"{block.path}." for block in blocks)
    tensors = {name: held for name, held in tensors.items() if not name.startswith(gone)}
    experts = []
    if wish.asks_for("expert"):
        mixtures = left_mixtures(analysis, blocks)
        experts = choose_experts(
            mixtures, tensors, wish.importance, float(wish.ratio or 0.0), wish.ratios, wish.ignore
        )
        scored = {(mixture.router, mixture.rows) for mixture in mixtures}
        infos = [info for info in infos if not scored.intersection(info.parameter_dims)]
    scores = scores_by_axis(axes, tensors, wish.importance)
    indices = _Indices(analysis, wish, infos, tensors, scores, uniformity, [block.path for block in blocks])
    return Selection(indices.keep(), blocks, experts, indices.solver)


def _blocks(
    model: nn.Module, analysis: Analysis, wish: Wish, tensors: dict[str, torch.Tensor], *, alone: bool
) -> list[Any]:
    if wish.blocks:
        return named_blocks(analysis, wish.blocks)
    if not wish.asks_for("block"):
        return []
    return select_blocks(
        model,
        analysis,
        tensors,
        wish.importance,
        ratio=wish.ratio,
        target=wish.target,
        ratios=wish.ratios,
        ignore=wish.ignore,
        scope=wish.scope,
        alone=alone,
    )


class _Indices:
    """Chooses the indices of the axes: first how many stay of each, then which."""

    def __init__(
        self,
        analysis: Analysis,
        wish: Wish,
        infos: Sequence[AxisInfo],
        tensors: dict[str, torch.Tensor],
        scores: dict[Axis, torch.Tensor],
        uniformity: Uniformity | None,
        removed_blocks: list[str],
    ) -> None:
        self.analysis, self.wish, self.scores = analysis, wish, scores
        self.uniformity, self.removed_blocks = uniformity, removed_blocks
        self.solver = analysis.solver if uniformity is None else uniformity.solver
        # axes of removed blocks follow the others, because sizes may have to agree with theirs
        self.lost = [info for info in infos if not any(name in tensors for name, _ in info.parameter_dims)]
        self.infos = [info for info in infos if info not in self.lost]

    def keep(self) -> Keep:
        """Return which indices stay; tried again where the model's config would not describe them."""
        keep = self._once()
        if self.uniformity is not None:
            for _ in range(_MOST_TRIES):
                if self.uniformity.accepts(keep):
                    break
                keep = self._once()
        return keep

    def _once(self) -> Keep:
        counts = self._wanted(count_steps(self.analysis, self.wish.round_to))
        kept: dict[Axis, torch.Tensor] = {}
        for info in [*self.infos, *self.lost]:
            if counts[info.axis] < info.size:
                kept[info.axis] = best_indices(self.scores[info.axis], counts[info.axis])
        return kept

    def _wanted(self, steps: Multiple) -> Counts:
        """Return how many indices of each axis stay."""
        wish = self.wish
        if wish.is_named:
            every = [info for info in self.analysis.selected() if wish.wants(info)]
            return self.solver.solve(counts_by_name(every, wish.counts or {}), steps)
        if wish.target is None or not self.infos:
            return self.solver.solve(self._counts(float(wish.ratio or 0.0)), steps)
        ((name, share),) = wish.target.items()
        cost = CostModel.of(self.analysis, self.removed_blocks)
        share = min(1.0, float(share) * CostModel.of(self.analysis).cost(name, {}) / cost.cost(name, {}))
        priced = self._by_price(cost, name, share, steps) if wish.scope == "cost" else None
        if priced is not None:
            return priced
        return counts_for_target(self._counts, self.solver, cost, name, share, steps)

    def _by_price(self, cost: CostModel, name: str, share: float, steps: Multiple) -> Counts | None:
        wish = self.wish
        least = {info.axis: fewest(info, wish.largest_ratio, wish.minimum) for info in self.infos}
        return counts_by_price(self.infos, self.scores, self.solver, cost, name, share, steps, least)

    def _counts(self, ratio: float) -> Counts:
        wish = self.wish
        others = local_counts(self.lost, ratio, wish.ratios, wish.minimum)
        if wish.scope != "local":
            ranked = global_counts(self.infos, ratio, self.scores, wish.largest_ratio, wish.minimum)
            return {**others, **ranked}
        return {**others, **local_counts(self.infos, ratio, wish.ratios, wish.minimum)}
