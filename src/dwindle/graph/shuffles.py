"""What channel shuffles ask of counts: parallel parts keep equally many, and whoever takes turns keeps its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dwindle.graph.axes import INTERLEAVED, PARALLEL, Axis
from dwindle.graph.counts import sized
from dwindle.graph.expressions import Dimension, Expression, Operation
from dwindle.graph.rules.registry import Observation, Scope

#: Operators that pass parallel axes on as they are; before any other one they are made one axis.
PASSING = frozenset(
    {
        "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze",
        "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "contiguous", "clone",
        "alias", "detach",
    }
)  # fmt: skip


def every_axis(axes: Iterable[Axis]) -> Iterator[Axis]:
    """Yield the representatives of the axes and of all below them, each once."""
    seen: set[Axis] = set()
    stack = list(axes)
    while stack:
        axis = stack.pop().find()
        if axis not in seen:
            seen.add(axis)
            yield axis
            stack += axis.parts


def observe_shuffles(axes: Iterable[Axis], scope: Scope) -> None:
    """Write down what the shuffles among ``axes`` ask of counts."""
    for axis in every_axis(axes):
        if axis.kind == PARALLEL:
            scope.same_counts.append(list(axis.parts))
            scope.turns.update(axis.leaves())
        elif axis.kind == INTERLEAVED:
            _observe_turns(axis, scope)
            scope.turns.update(axis.leaves())


def _observe_turns(axis: Axis, scope: Scope) -> None:
    """Each part has as many positions between the start and the end of the axis as fall to it by turns."""
    count = len(axis.parts)
    if len({part.find() for part in axis.parts}) == 1 and not axis.before:
        return
    start: Expression = 0
    for piece in axis.before:
        start = Operation("add", (start, Dimension(sized(piece), 0)))
    end = Operation("add", (start, Dimension(sized(axis), 0)))
    for number, part in enumerate(axis.parts):
        until = [
            Operation("floordiv", (Operation("add", (border, count - 1 - number)), count))
            for border in (end, start)
        ]
        scope.observations.append(Observation(Operation("sub", tuple(until)), [part], 1, None))


def shuffled_leaves(axes: Iterable[Axis]) -> set[Axis]:
    """Return the leaves that take turns: pieces of them are small, but must shrink with the others."""
    return {leaf for axis in every_axis(axes) if axis.kind == INTERLEAVED for leaf in axis.leaves()}
