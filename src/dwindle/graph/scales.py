"""Temperatures that depend on a size: where they are, and which weights can take up their change.

Attention divides its scores by the square root of the head width. When width goes, code that computes this factor
computes another one, and the small model would no longer be the masked one. The change can be given to the weights
that make the queries, as long as nothing else reads them. Where there is no such place, the size stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dwindle.graph import axes as algebra
from dwindle.graph.expressions import Attribute, Dimension, Expression, Operation, variables
from dwindle.graph.homogeneity import UNARY, Followed, base_name, flat, uses_of
from dwindle.graph.nodes import Node, Value
from dwindle.graph.origins import Elements, origins
from dwindle.graph.rules.contraction import default_scale
from dwindle.graph.rules.registry import Scope, recorded_value
from dwindle.graph.trace import Trace

_ATTENTION = "scaled_dot_product_attention"
_MULTIPLIED, _DIVIDED = ("mul", "multiply"), ("div", "divide", "true_divide")
_NUMBERS = ("lift_fresh", "lift_fresh_copy", "full", "scalar_tensor", "new_full", "full_like")

NO_PLACE = "the default scale of attention depends on the head width, and no weight can take up its change"


@dataclass(slots=True)
class Scale:
    """One call whose result is multiplied by a number that depends on sizes.

    Attributes:
        node: The call.
        expression: Where the number comes from.
        power: 1 where the result is multiplied by it, -1 where it is divided.
        operands: Tensors whose factor would be the result's factor.
    """

    node: Node
    expression: Expression
    power: float
    operands: list[Value]


@dataclass(slots=True)
class Compensation:
    """Weights that take up the change of one number.

    Attributes:
        expression: The number.
        places: Elements of parameters, with the power of (new number / old number) that they are multiplied by.
        where: Source lines of the calls.
    """

    expression: Expression
    places: list[tuple[Elements, float]]
    where: list[str] = field(default_factory=list)


def expression_key(expression: Expression) -> Any:
    """Equal for expressions that always have the same value: sizes of one axis are one variable."""
    if isinstance(expression, Dimension):
        axes = expression.value.axes
        if not axes:
            return "size", id(expression.value), expression.dim
        return "axis", *(leaf.number for leaf in axes[expression.dim].leaves())
    if isinstance(expression, Operation):
        return expression.name, *(expression_key(operand) for operand in expression.operands)
    return expression


def _may_change(expression: Expression) -> bool:
    """Whether an expression has a size in it from which something could be removed."""
    for variable in variables(expression):
        if isinstance(variable, Attribute):
            if isinstance(variable.number, int):
                return True
        elif any(leaf.frozen is None for leaf in variable.value.axes[variable.dim].leaves()):
            return True
    return False


def scale_of(node: Node, expression: Expression) -> Scale | None:
    """Return what the number ``expression`` does in a call; None where it is no factor."""
    name, number = base_name(node), float(recorded_value(expression))
    values = list(node.inputs())

    def given(argument: Any) -> bool:
        return isinstance(argument, int | float) and math.isclose(argument, number, rel_tol=1e-12)

    if not node.outputs or not node.output.is_floating:
        return None
    if name in (*_MULTIPLIED, *_DIVIDED) and len(values) == 1 and len(node.args) > 1 and given(node.args[1]):
        plain = node.argument("rounding_mode") is None
        return Scale(node, expression, 1 if name in _MULTIPLIED else -1, values) if plain else None
    if name == _ATTENTION:
        own = node.argument("scale")
        fits = given(own) if own is not None else expression == default_scale(values[0])
        return Scale(node, expression, 1, values[:2]) if fits else None
    if name in ("baddbmm", "addmm") and given(node.argument("alpha")):
        return Scale(node, expression, 1, values[1:3])
    if name in _NUMBERS and math.prod(node.output.shape) == 1:
        return Scale(node, expression, 1, [])
    return None


class ScaleFinder:
    """Looks for the weights that can take up the change of a number.

    Args:
        traces: Recordings of one model; a place must do in all of them.
    """

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.traces = list(traces)
        self.live = [trace.live_nodes() for trace in traces]
        self.uses = [uses_of(live) for live in self.live]

    def find(self, scales: Sequence[Scale]) -> Compensation | None:
        """Return the places for one number, which all of ``scales`` use; None where one has none."""
        pending = {id(scale.node): scale for scale in scales}
        found = Compensation(
            scales[0].expression, [], list(dict.fromkeys(scale.node.where for scale in scales))
        )
        while pending:
            scale = next(iter(pending.values()))
            covered = self._place(scale, pending, found)
            if not covered:
                return None
            for identity in covered:
                pending.pop(identity, None)
        return found

    def _place(self, scale: Scale, pending: dict[int, Scale], found: Compensation) -> set[int]:
        """Find a place for one use of the number; returns every use that it serves."""
        for operand in scale.operands:
            for elements in origins(operand):
                covered = self._checked(elements, -scale.power, pending, [])
                if id(scale.node) in covered:
                    found.places.append((elements, -scale.power))
                    return covered
        for opened in ([scale], list(pending.values())):
            for operand, degree in self._behind(scale):
                for elements in origins(operand):
                    covered = self._checked(elements, degree, pending, opened)
                    if id(scale.node) in covered:
                        found.places.append((elements, degree))
                        return covered
        return set()

    def _behind(self, scale: Scale) -> Iterator[tuple[Value, float]]:
        """Tensors that meet the result of a call, with the power they would need."""
        for live, uses, trace in zip(self.live, self.uses, self.traces, strict=True):
            start: dict[str | int, torch.Tensor] = {
                id(scale.node.output): flat(scale.power, len(scale.node.output.shape))
            }
            if not any(node is scale.node for node in live) or base_name(scale.node) == _ATTENTION:
                continue
            followed = Followed(trace, live, uses, start, {})
            for node in followed.passed:
                if base_name(node) not in (*_MULTIPLIED, *_DIVIDED, "matmul", "bmm", "mm", "linear"):
                    continue
                degree = followed.degree(node.output)
                values = list(node.inputs())[:2]
                for place, value in enumerate(values):
                    if degree and value.is_floating and not followed.degree(value):
                        turned = place == 1 and base_name(node) in _DIVIDED
                        yield value, degree if turned else -degree

    def _checked(
        self, elements: Elements, degree: float, pending: dict[int, Scale], opened: Sequence[Scale]
    ) -> set[int]:
        """Uses whose change is taken up when ``elements`` get that power; empty where something notices."""
        sources = {identity: scale.power for identity, scale in pending.items()}
        covered: set[int] = set()
        for trace, live, uses in zip(self.traces, self.live, self.uses, strict=True):
            start: dict[str | int, torch.Tensor] = {
                name: chosen.float() * degree for name, chosen in elements.items()
            }
            here = set(map(id, live))
            for scale in opened:
                if id(scale.node) in here:
                    output = scale.node.output
                    start[id(output)] = flat(scale.power, len(output.shape))
            own = {key: power for key, power in sources.items() if key not in set(map(id, _nodes(opened)))}
            followed = Followed(trace, live, uses, start, own)
            if not followed.vanishes:
                return set()
            covered |= followed.covered
        return covered | set(map(id, _nodes(opened)))


def _nodes(scales: Sequence[Scale]) -> list[Node]:
    return [scale.node for scale in scales]


def find_compensations(traces: Sequence[Trace], scope: Scope) -> list[Compensation]:
    """Find the weights for every number in ``scope.scales`` that depends on sizes.

    Numbers with a place leave ``scope.scales``; those that stay there must not change. Where the number is
    attention's own default, the head width is frozen, with the reason.
    """
    groups: dict[Any, list[tuple[Node, Expression]]] = {}
    for node, expression in scope.scales:
        if _may_change(expression):
            groups.setdefault(expression_key(expression), []).append((node, expression))
    finder = ScaleFinder(traces) if groups else None
    found: list[Compensation] = []
    served: set[tuple[int, Any]] = set()
    for key, entries in groups.items():
        scales = [
            scale_of(node, expression) for node, expression in entries if base_name(node) not in _CARRIERS
        ]
        useful = [scale for scale in scales if scale is not None]
        compensation = finder.find(useful) if finder and useful and len(useful) == len(scales) else None
        if compensation is not None:
            found.append(compensation)
            served |= {(id(node), key) for node, _ in entries}
        else:
            _freeze_defaults(entries, scope)
    scope.scales[:] = [
        (node, expression)
        for node, expression in scope.scales
        if (id(node), expression_key(expression)) not in served
    ]
    return found


#: A number reaches these only because the call that made its tensor ends in them.
_CARRIERS = UNARY - {"lift", "lift_fresh", "lift_fresh_copy", "dropout", "alpha_dropout", "feature_dropout"}


def _freeze_defaults(entries: Sequence[tuple[Node, Expression]], scope: Scope) -> None:
    for node, _ in entries:
        if base_name(node) == _ATTENTION and node.argument("scale") is None:
            algebra.freeze(next(node.inputs()).axes[-1], NO_PLACE, node.where)
