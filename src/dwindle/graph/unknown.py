"""Operators that no rule follows, and what that costs: the parameters they froze."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dwindle.graph.analysis import Analysis


@dataclass(frozen=True, slots=True)
class UnknownOperator:
    """An operator that is not followed, at one source line.

    Attributes:
        name: The operator.
        where: Source line.
        parameters: Parameters with a dimension that it froze.
        elements: Number of their elements.
        share: Share of all parameter elements of the model.
    """

    name: str
    where: str
    parameters: tuple[str, ...]
    elements: int
    share: float

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "operator": self.name,
            "line": self.where,
            "parameters": list(self.parameters),
            "elements": self.elements,
            "share": self.share,
        }

    def __str__(self) -> str:
        names = ", ".join(self.parameters[:4]) + (", ..." if len(self.parameters) > 4 else "")
        cost = f"{self.elements:,} elements, {self.share:.1%} of the parameters"
        return f"{self.name} at {self.where}: froze {names or 'no parameter'} ({cost})"


def unknown_operators(analysis: Analysis) -> list[UnknownOperator]:
    """Return the operators that are not followed, those that froze the most first.

    An axis counts for the operator that froze it first; one that was frozen already is not counted again.
    """
    sizes = {
        name: math.prod(value.shape)
        for trace in analysis.traces
        for name, value in trace.parameters.items()
        if value.kind == "parameter"
    }
    total = max(sum(sizes.values()), 1)
    found = []
    for name, where in dict.fromkeys((node.name, node.where) for node in analysis.scope.unknown):
        frozen = {
            parameter
            for info in analysis.axes
            if info.source_line == where and _is_reason(info.frozen_reason, name)
            for parameter, _ in info.parameter_dims
            if parameter in sizes
        }
        names = tuple(parameter for parameter in sizes if parameter in frozen)
        elements = sum(sizes[parameter] for parameter in names)
        found.append(UnknownOperator(name, where, names, elements, elements / total))
    return sorted(found, key=lambda operator: -operator.elements)


def _is_reason(reason: str | None, name: str) -> bool:
    """Whether a reason is the one that an operator without a (fitting) rule gives."""
    return reason is not None and reason.startswith((f"operator {name} ", f"the rule of {name} "))
