"""The space of ratios: one variable a coupled axis of a model, and how ratios become counts that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis, AxisInfo
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts, CountSolver
from dwindle.realize.choose import is_named
from dwindle.realize.named_axes import axis_names

__all__ = ["NamedCounts", "Space", "Variable"]

#: How many indices of each variable stay, by the variable's name.
NamedCounts = dict[str, int]

#: The cost of counts.
CostOf = Callable[[Counts], float]


@dataclass(frozen=True, eq=False, slots=True)
class Variable:
    """One axis that may shrink.

    Attributes:
        name: A parameter and dimension that has it (``"layer1.0.conv1.weight[0]"``): the same in every process.
        info: The axis as the analysis describes it.
        least: Fewest indices that may stay.
    """

    name: str
    info: AxisInfo
    least: int

    @property
    def size(self) -> int:
        """Number of indices of the whole axis."""
        return self.info.size

    @property
    def axis(self) -> Axis:
        """The axis itself."""
        return self.info.axis

    @property
    def largest_ratio(self) -> float:
        """The largest share that may go."""
        return 1 - self.least / self.size

    @property
    def extent(self) -> int:
        """Number of places that it has in the model's tensors, times its size."""
        return self.size * len(self.info.parameter_dims)

    def count_at(self, ratio: float) -> int:
        """Number of indices that stay at a ratio (halves are rounded up), within the bounds."""
        return max(self.least, min(self.size, int(self.size * (1 - ratio) + 0.5)))


class Space:
    """All variables of a model, in the order in which the model uses them.

    Args:
        variables: The axes that may shrink.
        solver: Constraints between their counts.
        round_to: Counts become a multiple of this where the size allows it.
    """

    def __init__(self, variables: Sequence[Variable], solver: CountSolver, round_to: int = 1) -> None:
        self.variables = tuple(variables)
        self.by_name = {variable.name: variable for variable in variables}
        self.solver = solver
        self.round_to = round_to

    @classmethod
    def of(
        cls,
        analysis: Analysis,
        *,
        kinds: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        minimum: int = 1,
        largest_ratio: float = 0.9,
        round_to: int = 1,
        floors: Mapping[str, int] | None = None,
    ) -> Space:
        """Return the space of an analysed model.

        Args:
            analysis: The axes.
            kinds: Kinds of axes that may shrink; None means all that shrink by default.
            ignore: Parameter names, module names or patterns whose axes stay.
            minimum: At least so many indices of each axis stay.
            largest_ratio: The most that any axis loses.
            round_to: Counts become a multiple of this.
            floors: Fewest indices by variable name, in place of ``minimum`` and ``largest_ratio`` (for a model that
                was cut before).

        Raises:
            ConfigError: A bound is not valid, or no axis may shrink.
        """
        if not 0 < largest_ratio < 1:
            raise ConfigError(
                f"largest_ratio: {largest_ratio} is not between 0 and 1 (an emptied layer is none)"
            )
        for name, number in (("minimum", minimum), ("round_to", round_to)):
            if number < 1:
                raise ConfigError(f"{name}: {number} is not a positive number")
        infos = [
            info
            for info in analysis.selected()
            if (kinds is None or info.kind in kinds)
            and not any(is_named(name, pattern) for pattern in ignore for name, _ in info.parameter_dims)
        ]
        if not infos and floors is None:
            raise ConfigError("no axis of this model may shrink (dwindle inspect says why for each)")
        order = _order_of_use(analysis)
        infos.sort(
            key=lambda info: (min(order.get(name, len(order)) for name, _ in info.parameter_dims), info.id)
        )
        variables = []
        for name, info in zip(axis_names(infos), infos, strict=True):
            least = (floors or {}).get(name, max(minimum, round(info.size * (1 - largest_ratio))))
            variables.append(Variable(name, info, min(info.size, least)))
        return cls(variables, analysis.solver, round_to)

    # between ratios, counts of axes, and counts by name

    def solved(self, wanted: Mapping[Axis, int]) -> Counts:
        """Return the smallest counts that satisfy all constraints of the model, none below its wish."""
        return self.solver.solve(
            {variable.axis: wanted[variable.axis] for variable in self.variables}, self.round_to
        )

    def counts(self, ratios: Mapping[str, float]) -> Counts:
        """Return counts for ratios by name; variables that are not named keep all."""
        return self.solved({v.axis: v.count_at(ratios.get(v.name, 0.0)) for v in self.variables})

    def named(self, counts: Counts) -> NamedCounts:
        """Return counts by name."""
        return {variable.name: counts.get(variable.axis, variable.size) for variable in self.variables}

    def from_names(self, named: Mapping[str, int]) -> Counts:
        """Return counts of axes for counts by name, as they are.

        Raises:
            ConfigError: A name is not known, or a count is not possible.
        """
        counts = {}
        for name, count in named.items():
            if name not in self.by_name:
                raise ConfigError(f"the space has no variable {name!r}")
            variable = self.by_name[name]
            if not 1 <= count <= variable.size:
                raise ConfigError(f"{name}: {count} of {variable.size} cannot stay")
            counts[variable.axis] = count
        return {**self.full(), **counts}

    def full(self) -> Counts:
        """Counts of the whole model."""
        return {variable.axis: variable.size for variable in self.variables}

    def smallest(self) -> Counts:
        """Counts of the smallest model of the space."""
        return self.solved({variable.axis: variable.least for variable in self.variables})

    def ratios(self, counts: Counts) -> dict[str, float]:
        """Return the share of each variable that goes."""
        return {v.name: 1 - counts.get(v.axis, v.size) / v.size for v in self.variables}

    # meeting a budget

    def fit(self, ratios: Mapping[str, float], cost: CostOf, budget: float) -> Counts:
        """Scale ratios until the cost meets a budget: at most the budget, and no single count can grow within it.

        Ratios shrink in proportion, or grow in proportion to the room that is left to each one's largest. Counts are
        rounded one variable after the other, the dearest first, and the others are scaled anew each time, so that a
        wide step of one is paid for by all that are not rounded yet.

        Args:
            ratios: By name; 0 where a variable is not named.
            cost: Falls with falling counts.
            budget: In the unit of the cost.

        Raises:
            ConfigError: The smallest model of the space is above the budget.
        """
        check_reachable(cost(self.smallest()), budget, cost(self.full()))
        if cost(self.full()) <= budget:
            return self.full()
        counts = self.solved(self._rounded(ratios, cost, budget))
        if cost(counts) > budget:
            counts = self._scaled_down(ratios, cost, budget)
        return self.filled(counts, cost, budget)

    def _rounded(self, ratios: Mapping[str, float], cost: CostOf, budget: float) -> dict[Axis, int]:
        """Counts near the scaled ratios, without the constraints between them."""
        whole = cost(self.full())
        step = {v: (whole - cost({**self.full(), v.axis: 0})) / v.size for v in self.variables}
        fixed: dict[Axis, int] = {}
        for variable in sorted(self.variables, key=lambda own: -step[own]):
            wanted = self._continuous(ratios, cost, budget, fixed)[variable.axis]
            count = round(wanted / self.round_to) * self.round_to
            fixed[variable.axis] = max(variable.least, min(variable.size, count))
            if cost({**self._least(), **fixed}) > budget:
                fixed[variable.axis] = max(variable.least, int(wanted))
        return fixed

    def _least(self) -> Counts:
        return {variable.axis: variable.least for variable in self.variables}

    def _continuous(
        self, ratios: Mapping[str, float], cost: CostOf, budget: float, fixed: Counts
    ) -> dict[Axis, float]:
        """Counts as real numbers that meet the budget, where the fixed ones allow it."""
        low, high = 0.0, 2.0
        found: dict[Axis, float] = {}
        for _ in range(16):
            middle = (low + high) / 2
            scaled = self._scaled(ratios, middle)
            found = {v.axis: v.size * (1 - scaled[v.name]) for v in self.variables}
            found.update(fixed)
            if cost(found) <= budget:  # type: ignore[arg-type]  # a cost is a sum of products of any numbers
                high = middle
            else:
                low = middle
        return found

    def _scaled_down(self, ratios: Mapping[str, float], cost: CostOf, budget: float) -> Counts:
        """Counts of the smallest scale whose solution lies within the budget."""
        low, high = 0.0, 2.0
        found = self.smallest()
        for _ in range(24):
            middle = (low + high) / 2
            counts = self.counts(self._scaled(ratios, middle))
            if cost(counts) <= budget:
                high, found = middle, counts
            else:
                low = middle
        return found

    def _scaled(self, ratios: Mapping[str, float], scale: float) -> dict[str, float]:
        """Ratios at a scale: 0 is nothing, 1 as they are, 2 is the largest of each."""
        scaled = {}
        for variable in self.variables:
            top = variable.largest_ratio
            own = min(max(ratios.get(variable.name, 0.0), 0.0), top)
            scaled[variable.name] = own * scale if scale <= 1 else own + (top - own) * (scale - 1)
        return scaled

    def filled(
        self,
        counts: Counts,
        cost: CostOf,
        budget: float,
        first: Callable[[Variable, Counts], float] | None = None,
    ) -> Counts:
        """Give indices back, one after another, as long as the budget holds; afterwards no single count can grow.

        Args:
            counts: Within the budget.
            cost: Falls with falling counts.
            budget: In the unit of the cost.
            first: The variable with the smallest number gets the next index; None: the one that lost the largest
                share.
        """
        counts = dict(counts)
        rank = first or (lambda variable, now: now[variable.axis] / variable.size)
        growing = list(self.variables)
        while growing:
            variable = min(growing, key=lambda own: rank(own, counts))
            grown = self.grown(counts, variable)
            if grown is not None and cost(grown) <= budget:
                counts = grown
            else:
                growing.remove(variable)  # costs only rise: it will not fit later either
        return counts

    def grown(self, counts: Counts, variable: Variable) -> Counts | None:
        """Return counts with one step more of a variable, or None when it is whole."""
        if counts[variable.axis] >= variable.size:
            return None
        return self.solved({**counts, variable.axis: counts[variable.axis] + 1})


def check_reachable(lowest: float, budget: float, full: float) -> None:
    """Refuse a budget below what the smallest model of a space costs.

    Raises:
        ConfigError: Naming both as shares of the whole model.
    """
    if lowest > budget:
        raise ConfigError(
            f"budget: {budget / full:.4g} of the model's cost cannot be reached; "
            f"the smallest model of the space costs {lowest / full:.4g} (largest_ratio and minimum bound it)"
        )


def _order_of_use(analysis: Analysis) -> dict[str, int]:
    """Position of the first operator that uses each parameter, by name."""
    names = {id(value): name for name, value in analysis.trace.parameters.items()}
    order: dict[str, int] = {}
    for position, node in enumerate(analysis.trace.live_nodes()):
        for value in node.inputs():
            if id(value) in names:
                order.setdefault(names[id(value)], position)
    return order
