"""Pruning: every coupled axis is cut alone, as ``dw.prune`` cuts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from dwindle.config.granularity import weight_axes
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.quantization.mixed_precision.layers import Unions
from dwindle.search.problem import Problem
from dwindle.search.sensitivities.points import Level, SensitivityTarget
from dwindle.search.sensitivities.subject import Selection
from dwindle.search.space import Variable

__all__ = ["Maker", "PrunedAxes", "makers_of"]


@dataclass(frozen=True)
class Maker:
    """A parameter whose output channels lie on an axis.

    Attributes:
        module: Path of the module.
        parameter: The parameter's name in it.
    """

    module: str
    parameter: str


def makers_of(model: nn.Module, variable: Variable) -> list[Maker]:
    """Return the weights that make the channels of an axis: those that a config_list of a pruner can rank.

    Grouped convolutions follow the others, where there are others.
    """
    found: dict[Maker, int] = {}
    for path, dim in variable.info.parameter_dims:
        module_path, _, name = path.rpartition(".")
        module = model.get_submodule(module_path)
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() < 2:
            continue
        if dim == weight_axes(type(module), parameter.dim())[0]:
            found[Maker(module_path, name)] = int(getattr(module, "groups", 1))
    alone = [maker for maker, groups in found.items() if groups == 1]
    return alone or list(found)


class PrunedAxes:
    """The axes of a model, each cut alone to some ratios.

    Axes whose counts must agree with those of others (the head counts of all layers, say) are one target together.

    Args:
        problem: The model and its axes.
        ratios: Shares that go.
        selection: Only axes that the weights of these modules make.
        options: What else a point depends on, as plain data.
    """

    kind = "pruning"

    def __init__(
        self, problem: Problem, ratios: Sequence[float], selection: Selection, options: Mapping[str, Any]
    ) -> None:
        self.problem, self.ratios = problem, tuple(sorted(ratios))
        self.options = dict(options)
        self.notes: list[str] = []
        self.units: dict[str, tuple[Variable, ...]] = {}
        targets = []
        for unit in self._all_units():
            makers = [maker for variable in unit for maker in makers_of(problem.model, variable)]
            if selection is not None and not any(maker.module in selection for maker in makers):
                continue
            name = unit[0].name
            self.units[name] = unit
            members = dict.fromkeys(f"{own.module}.{own.parameter}".lstrip(".") for own in makers)
            targets.append(SensitivityTarget(self.kind, name, tuple(members), unit[0].size))
        self.targets = tuple(targets)

    def levels(self, target: str) -> list[Level]:
        """Return the levels of an axis; ratios that round to the same count are one."""
        unit, found = self.units[target], {}
        for ratio in self.ratios:
            counts = self._counts(unit, ratio)
            kept = counts[unit[0].axis]
            if kept < unit[0].size:
                share = self.problem.cost.predicted(counts) / self.problem.cost.predicted({})
                found[kept] = Level(1 - kept / unit[0].size, (kept,), share)
        return list(found.values())

    @contextmanager
    def variant(self, target: str, level: Level) -> Iterator[nn.Module]:
        """Give a copy of the model with the axis cut: what ``dw.prune`` proves equal to the masked model."""
        unit = self.units[target]
        yield self.problem.build(self._counts(unit, 1 - level.detail[0] / unit[0].size)).model

    def _counts(self, unit: Sequence[Variable], ratio: float) -> Counts:
        return self.problem.space.counts({variable.name: ratio for variable in unit})

    def _all_units(self) -> list[tuple[Variable, ...]]:
        """Return the variables that can be cut alone, and sets of those that only can be cut together."""
        space = self.problem.space
        unions = Unions()
        for constraint in space.solver.constraints:
            for leaf in constraint.leaves[1:]:
                unions.unite(constraint.leaves[0], leaf)
        units: dict[Axis, list[Variable]] = {}
        for variable in space.variables:
            own = {variable.name: variable.largest_ratio}
            moves = space.counts(own)[variable.axis] < variable.size
            key = variable.axis if moves else unions.find(variable.axis)
            units.setdefault(key, []).append(variable)  # type: ignore[arg-type]
        found = []
        for unit in units.values():
            counts = space.counts({variable.name: variable.largest_ratio for variable in unit})
            if counts[unit[0].axis] < unit[0].size:
                found.append(tuple(unit))
            else:
                self.notes.append(f"pruning: {unit[0].name} stays whole, whatever its ratio")
        return found
