"""The choice of bits as an integer program: one zero or one for each variable and number of bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from dwindle.config.errors import DwindleError, require
from dwindle.quantization.mixed_precision.allocation import Allocation, Assignment

_SCALE = 1e6
"""Of the largest harm: the solver takes differences below a millionth for none."""


class IntegerProgram:
    """The program of one problem.

    ``x[v, b]`` is 1 when variable ``v`` has ``b`` bits. The larger of the bits of a layer's weight and input is a
    variable of its own that lies above both.

    Args:
        problem: What may be chosen.
        limit: A cost that can be reached.
    """

    def __init__(self, problem: Allocation, limit: int) -> None:
        self.problem = problem
        self.variables = (*problem.weights, *problem.activations)
        self.columns = [(number, bits) for number, own in enumerate(self.variables) for bits in own.choices]
        self.place = {column: position for position, column in enumerate(self.columns)}
        self.pairs = list(_pairs(problem))
        self.width = len(self.columns) + len(self.pairs)
        self.rows: list[NDArray[np.float64]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for number, own in enumerate(self.variables):
            self.add({self.place[number, bits]: 1.0 for bits in own.choices}, 1.0, 1.0)
        for position, (weight, read, _) in enumerate(self.pairs, len(self.columns)):
            for number in (weight, len(problem.weights) + read):
                bits_of = {self.place[number, bits]: -float(bits) for bits in self.variables[number].choices}
                self.add({**bits_of, position: 1.0}, 0.0, math.inf)
        self.add(self._cost(), -math.inf, limit / problem.reference)

    def add(self, entries: Mapping[int, float], low: float, high: float) -> None:
        """Add a constraint: a sum of columns lies between two numbers."""
        row = np.zeros(self.width)
        for column, value in entries.items():
            row[column] += value
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def _cost(self) -> dict[int, float]:
        """Return what each column costs, as a share of the cost at 8 bits."""
        problem = self.problem
        if problem.cost == "bit_operations":
            return {
                own: macs / problem.reference
                for own, (_, _, macs) in enumerate(self.pairs, len(self.columns))
            }
        cost: dict[int, float] = {}
        for term in problem.terms:
            for bits in problem.weights[term.weight].choices:
                column = self.place[term.weight, bits]
                cost[column] = cost.get(column, 0.0) + term.size * bits / problem.reference
        return cost

    def solve(self) -> list[int]:
        """Return the chosen columns.

        Raises:
            MissingDependencyError: scipy is not installed.
            DwindleError: The solver found nothing.
        """
        optimize = require("scipy.optimize", "mixed")
        harms = np.array([self.variables[number].harm[bits] for number, bits in self.columns])
        goal = np.zeros(self.width)
        goal[: len(self.columns)] = harms * (_SCALE / max(float(np.abs(harms).max()), 1e-300))
        own = np.arange(self.width) < len(self.columns)
        found = optimize.milp(
            goal,
            constraints=optimize.LinearConstraint(
                np.array(self.rows), np.array(self.low), np.array(self.high)
            ),
            integrality=own.astype(int),
            bounds=optimize.Bounds(0.0, np.where(own, 1.0, np.inf)),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise DwindleError(f"the integer program found no solution: {found.message}")
        return [column for column in range(len(self.columns)) if found.x[column] > 0.5]


def solve(problem: Allocation, limit: int) -> Assignment:
    """Return the assignment of least harm that costs at most ``limit``.

    Args:
        problem: What may be chosen.
        limit: A cost that can be reached.

    Raises:
        MissingDependencyError: scipy is not installed.
        DwindleError: The solver found nothing.
    """
    program = IntegerProgram(problem, limit)
    while True:
        chosen = program.solve()
        bits = [program.columns[column][1] for column in chosen]
        assignment = tuple(bits[: len(problem.weights)]), tuple(bits[len(problem.weights) :])
        if problem.cost_of(assignment) <= limit:
            return assignment
        # Above the limit by less than the solver can tell: this one is excluded.
        program.add(dict.fromkeys(chosen, 1.0), -math.inf, len(chosen) - 1.0)


def _pairs(problem: Allocation) -> Iterator[tuple[int, int, int]]:
    """Yield the weight, the activation and the multiplications of each pair that meets in a layer."""
    if problem.cost == "bit_operations":
        for term in problem.terms:
            for read, macs in term.activations.items():
                yield term.weight, read, macs


__all__ = ["solve"]
