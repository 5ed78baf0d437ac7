"""How many indices of each axis may stay: sizes that must agree, solved before indices are chosen.

"Same count, other indices" is a relation of its own beside "same axis": a reshape that takes one tensor's size
from another, halves that must stay equally long, one attribute that sizes two axes. Counts only ever grow while
constraints are repaired, so the search ends, at the latest with the full size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwindle.graph.axes import LEAF, PARALLEL, PRODUCT, Axis
from dwindle.graph.expressions import (
    Attribute,
    Dimension,
    Expression,
    Operation,
    describe,
    evaluate,
    variables,
)
from dwindle.graph.rules.registry import Scope, recorded_value

Counts = dict[Axis, int]

#: Counts become a multiple of this: one number for all axes, or one an axis.
Multiple = int | Mapping[Axis, int]


def count_of(axis: Axis, counts: Counts) -> int:
    """Size of ``axis`` when its leaves keep ``counts`` (leaves not named keep all)."""
    axis = axis.find()
    if axis.kind == LEAF:
        return counts.get(axis, axis.size)
    if axis.kind == PARALLEL:
        return count_of(axis.parts[0], counts)
    parts = [count_of(part, counts) for part in axis.parts]
    return math.prod(parts) if axis.kind == PRODUCT else sum(parts)


@dataclass(slots=True)
class Constraint:
    """``left`` (an expression) must equal ``right`` (axes whose sizes add up, or another expression).

    Attributes:
        left: An expression over attributes and sizes.
        right: A list of axes, or an expression.
        sign: -1 when the expression counts from the end.
        where: Source line.
        leaves: The removable leaves it depends on.
    """

    left: Expression
    right: list[Axis] | Expression
    sign: int
    where: str
    leaves: list[Axis] = field(default_factory=list)

    def __str__(self) -> str:
        right = " + ".join(map(repr, self.right)) if isinstance(self.right, list) else describe(self.right)
        return f"{describe(self.left)} == {right}"


def dimension_axis(variable: Dimension) -> Axis | None:
    """Axis behind a size that was read from a tensor; None where the tensor was never followed."""
    axes = variable.value.axes
    return axes[variable.dim] if axes else None


class CountSolver:
    """Constraints between counts, and their repair.

    Args:
        scope: What the rules observed.
        equalities: Expressions that the user's code compared and found equal.
        candidates: Leaves from which indices may be removed.
    """

    def __init__(
        self, scope: Scope, equalities: Iterable[tuple[Expression, Expression]], candidates: Iterable[Axis]
    ) -> None:
        self.candidates = set(candidates)
        self.turns = set(scope.turns)
        self.definitions: dict[Attribute, list[Axis]] = {}
        self.constraints: list[Constraint] = []
        seen: set[Any] = set()
        for observation in scope.observations:
            if isinstance(observation.expression, int) and not scope.literals_bind:
                continue
            where = observation.node.where if observation.node else ""
            self._add(observation.expression, observation.axes, observation.sign, where, seen)
        for left, right in equalities:
            self._add_equality(left, right, seen)
        for pieces in scope.same_counts:
            for piece in pieces[1:]:
                self._add_same(pieces[0], piece, seen)
        for node, expression in scope.scales:
            self._keep(expression, node.where, seen)
        for where, expression in scope.plain:
            self._keep(expression, where, seen)
        for axis, multiple, where in scope.aligned:
            rest = Operation("mod", (Dimension(_Sized(axis), 0), multiple))
            self.constraints.append(Constraint(rest, 0, 1, where))
        for constraint in self.constraints:
            constraint.leaves = self._leaves(constraint)
        self.constraints = [constraint for constraint in self.constraints if constraint.leaves]

    # building

    def _add(self, left: Expression, axes: list[Axis], sign: int, where: str, seen: set[Any]) -> None:
        if isinstance(left, Dimension) and len(axes) == 1:
            own = dimension_axis(left)
            if own is not None and own.find() is axes[0].find():
                return
        key = (self._key(left), tuple(id(axis.find()) for axis in axes), sign)
        if key in seen:
            return
        seen.add(key)
        if isinstance(left, Attribute) and sign == 1 and left not in self.definitions:
            self.definitions[left] = axes
            return
        self.constraints.append(Constraint(left, axes, sign, where))

    def _key(self, expression: Expression) -> Any:
        if isinstance(expression, Dimension):
            axis = dimension_axis(expression)
            return (
                ("size", id(axis.find()))
                if axis is not None
                else ("size", id(expression.value), expression.dim)
            )
        if isinstance(expression, Attribute | int | float):
            return expression
        return (expression.name, *(self._key(operand) for operand in expression.operands))

    def _add_equality(self, left: Expression, right: Expression, seen: set[Any]) -> None:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, Dimension) and (axis := dimension_axis(one)) is not None:
                self._add(other, [axis], 1, "a comparison", seen)
                return
        key = (self._key(left), self._key(right))
        if key[0] != key[1] and key not in seen:
            seen.add(key)
            self.constraints.append(Constraint(left, right, 1, "a comparison"))

    def _add_same(self, first: Axis, second: Axis, seen: set[Any]) -> None:
        if first.find() is not second.find():
            left = Dimension(_Sized(first), 0)
            self._add(left, [second], 1, "equal parts", seen)

    def _keep(self, expression: Expression, where: str, seen: set[Any]) -> None:
        """A factor computed from sizes (a temperature) must not change with them."""
        key = ("keep", self._key(expression))
        if key not in seen and any(True for _ in variables(expression)):
            seen.add(key)
            self.constraints.append(Constraint(expression, recorded_value(expression), 1, where))

    def _leaves(self, constraint: Constraint) -> list[Axis]:
        found: dict[int, Axis] = {}

        def visit(axes: Iterable[Axis]) -> None:
            for axis in axes:
                for leaf in axis.leaves():
                    if leaf in self.candidates:
                        found.setdefault(leaf.number, leaf)

        sides = [constraint.left] + ([] if isinstance(constraint.right, list) else [constraint.right])
        if isinstance(constraint.right, list):
            visit(constraint.right)
        for side in sides:
            for variable in variables(side):
                if isinstance(variable, Attribute):
                    visit(self.definitions.get(variable, []))
                elif (axis := dimension_axis(variable)) is not None:
                    visit([axis])
        return list(found.values())

    def extended(self) -> CountSolver:
        """Return a solver with the same constraints, to which more can be added without changing this one."""
        twin = copy.copy(self)
        twin.constraints = list(self.constraints)
        return twin

    def require(self, left: Expression, right: list[Axis] | Expression, where: str) -> None:
        """Add a constraint: ``left`` equals the summed size of axes, or another expression."""
        constraint = Constraint(left, right, 1, where)
        constraint.leaves = self._leaves(constraint)
        if constraint.leaves:
            self.constraints.append(constraint)

    # evaluating

    def value_of(self, counts: Counts) -> Callable[[Attribute | Dimension], Any]:
        """Return a function from an attribute or a size to its value under ``counts``."""

        def value(variable: Attribute | Dimension) -> Any:
            if isinstance(variable, Dimension):
                axis = dimension_axis(variable)
                return count_of(axis, counts) if axis is not None else variable.value.shape[variable.dim]
            if variable in self.definitions:
                return sum(count_of(axis, counts) for axis in self.definitions[variable])
            return variable.number

        return value

    def holds(self, constraint: Constraint, counts: Counts) -> bool:
        """Whether a constraint is satisfied under ``counts``."""
        return self.gap(constraint, counts) == 0

    def gap(self, constraint: Constraint, counts: Counts) -> float:
        """How far the two sides of a constraint are apart under ``counts``."""
        value = self.value_of(counts)
        left = evaluate(constraint.left, value)
        if isinstance(constraint.right, list):
            right = constraint.sign * sum(count_of(axis, counts) for axis in constraint.right)
        else:
            right = evaluate(constraint.right, value)
        return float(left - right)

    def attributes(self, counts: Counts) -> dict[Attribute, int]:
        """Return the new value of every attribute that changes under ``counts``."""
        value = self.value_of(counts)
        changed = {attribute: value(attribute) for attribute in self.definitions}
        return {attribute: number for attribute, number in changed.items() if number != attribute.number}

    # solving

    def solve(self, desired: Counts, multiple: Multiple = 1) -> Counts:
        """Return the smallest repair of ``desired``: counts that satisfy every constraint, none below its wish.

        Args:
            desired: Wanted count of each leaf; leaves that are not named keep all their indices.
            multiple: Counts are rounded up to a multiple of this where the size allows it; one number for all axes,
                or one an axis (1 where an axis is not listed).
        """
        counts = {
            leaf: _rounded(number, leaf.size, multiple_of(multiple, leaf)) for leaf, number in desired.items()
        }
        free = set(counts)
        pending = list(self.constraints)
        for _ in range(200):
            violated = [constraint for constraint in pending if not self.holds(constraint, counts)]
            if not violated:
                return counts
            for constraint in violated:
                if not self.holds(constraint, counts):
                    self._repair(constraint, counts, free, multiple)
        for leaf in self._bound_to(
            constraint for constraint in pending if not self.holds(constraint, counts)
        ):
            counts[leaf] = leaf.size
        unsolved = any(not self.holds(c, counts) for c in self.constraints)
        # a constraint that does not hold at full size either (a wish of the caller's) ends the repair
        return self.solve(counts, 1) if unsolved and counts != desired else counts

    def _bound_to(self, violated: Iterable[Constraint]) -> set[Axis]:
        """Leaves of the given constraints and of all that share leaves with them."""
        found = {leaf for constraint in violated for leaf in constraint.leaves}
        size = -1
        while size < len(found):
            size = len(found)
            for constraint in self.constraints:
                if not found.isdisjoint(constraint.leaves):
                    found.update(constraint.leaves)
        return found

    def _repair(self, constraint: Constraint, counts: Counts, free: set[Axis], multiple: Multiple) -> None:
        """Raise the counts of one violated constraint as little as possible."""
        leaves = [leaf for leaf in constraint.leaves if leaf in free and counts[leaf] < leaf.size]
        if leaves and any(leaf in self.turns for leaf in constraint.leaves):
            self._raise_the_last(constraint, counts, leaves)
            return
        best: tuple[float, tuple[int, ...], tuple[Axis, ...]] | None = None
        for leaf in leaves:
            number = self._smallest(constraint, counts, leaf, multiple)
            if number is not None:
                cost = (number - counts[leaf]) / leaf.size
                if best is None or cost < best[0]:
                    best = (cost, (number,), (leaf,))
        if best is None and len(leaves) >= 2:
            best = self._repair_pair(constraint, counts, leaves, multiple)
        if best is not None:
            for leaf, number in zip(best[2], best[1], strict=True):
                counts[leaf] = number
            return
        for leaf in leaves:
            counts[leaf] = leaf.size

    def _raise_the_last(self, constraint: Constraint, counts: Counts, leaves: list[Axis]) -> None:
        """Give one index back to the leaf that kept the smallest share, among those that bring the sides together.

        Pieces of a shuffle depend on each other in many constraints, whose solutions have nearly equal shares.
        """
        here = abs(self.gap(constraint, counts))
        order = sorted(leaves, key=lambda leaf: (counts[leaf] / leaf.size, leaf.number))
        better = (
            leaf for leaf in order if abs(self.gap(constraint, {**counts, leaf: counts[leaf] + 1})) < here
        )
        counts[next(better, order[0])] += 1

    def _repair_pair(
        self, constraint: Constraint, counts: Counts, leaves: list[Axis], multiple: Multiple
    ) -> tuple[float, tuple[int, ...], tuple[Axis, ...]] | None:
        best = None
        ordered = sorted(leaves, key=lambda leaf: leaf.size)
        pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
        for first, second in pairs[:6]:
            for number in _steps(counts[first] - 1, first.size, multiple_of(multiple, first))[:256]:
                cost = (number - counts[first]) / first.size
                if best is not None and cost >= best[0]:
                    break
                trial = {**counts, first: number}
                other = counts[second]
                if not self.holds(constraint, trial):
                    found = self._smallest(constraint, trial, second, multiple)
                    if found is None:
                        continue
                    other = found
                cost += (other - counts[second]) / second.size
                if best is None or cost < best[0]:
                    best = (cost, (number, other), (first, second))
        return best

    def _smallest(self, constraint: Constraint, counts: Counts, leaf: Axis, multiple: Multiple) -> int | None:
        """Smallest count of ``leaf`` above its present one that satisfies the constraint; None where none does."""
        here = self.gap(constraint, counts)
        slope = self.gap(constraint, {**counts, leaf: counts[leaf] + 1}) - here
        if slope:
            # most constraints are linear in one count
            number = counts[leaf] - here / slope
            if number.is_integer() and counts[leaf] < number <= leaf.size:
                whole = int(number)
                fits = whole % multiple_of(multiple, leaf) == 0 or whole == leaf.size
                if fits and self.holds(constraint, {**counts, leaf: whole}):
                    return whole
        steps = _steps(counts[leaf], leaf.size, multiple_of(multiple, leaf))
        if len(steps) > 64 and not _has_division(constraint.left):
            return None
        return next((n for n in steps if self.holds(constraint, {**counts, leaf: n})), None)


def _has_division(expression: Expression) -> bool:
    """Whether an expression rounds, so that it is not linear in a size."""
    if isinstance(expression, Operation):
        return expression.name in ("floordiv", "mod", "pow") or any(map(_has_division, expression.operands))
    return False


def summed_size(axes: list[Axis]) -> Expression:
    """The summed size of axes, as an expression."""
    total: Expression = Dimension(_Sized(axes[0]), 0)
    for axis in axes[1:]:
        total = Operation("add", (total, Dimension(_Sized(axis), 0)))
    return total


def sized(axis: Axis) -> Any:
    """Return what stands for a tensor of one dimension, ``axis``, in expressions over sizes."""
    return _Sized(axis)


@dataclass(eq=False, slots=True)
class _Sized:
    """Stands where a recorded value would, for a size that only exists as an axis."""

    axis: Axis

    @property
    def axes(self) -> list[Axis]:
        return [self.axis]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.axis.size,)


def multiple_of(multiple: Multiple, leaf: Axis) -> int:
    """Return the multiple that holds for one leaf."""
    return multiple if isinstance(multiple, int) else multiple.get(leaf, 1)


def _rounded(number: int, size: int, multiple: int) -> int:
    number = max(1, min(number, size))
    return min(size, -(-number // multiple) * multiple) if size >= multiple else size


def _steps(current: int, size: int, multiple: int) -> list[int]:
    """Counts above ``current`` that may be tried, the full size always among them."""
    if multiple <= 1:
        return list(range(current + 1, size + 1))
    first = -(-(current + 1) // multiple) * multiple
    return sorted({*range(first, size + 1, multiple), size} - set(range(current + 1)))
