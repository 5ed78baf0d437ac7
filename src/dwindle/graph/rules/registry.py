"""The table of rules, the scope that a rule works in, and the registration of rules by users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.expressions import Attribute, Dimension, Expression, evaluate
from dwindle.graph.nodes import Node, Value, values_in
from dwindle.graph.opaque import OpaqueTarget

#: Beyond this a tensor dimension is never cut into single indices.
_MANY = 64


@dataclass(slots=True)
class Observation:
    """The user's code (or an argument) fixes a size: ``expression`` must equal the summed size of ``axes``.

    Attributes:
        expression: Where the number came from; a plain integer is a literal of the code.
        axes: Axes whose sizes add up to it.
        sign: -1 when the number counts from the end.
        node: The call it was seen at.
    """

    expression: Expression
    axes: list[Axis]
    sign: int
    node: Node | None


@dataclass(slots=True)
class Mixing:
    """An operator that combines the indices of an axis, so that removing some of them changes the others.

    Attributes:
        node: The call.
        axes: The axes it combines.
        exact_on_zeros: Whether zeros at the removed indices leave the result unchanged (a sum, a product of
            matrices) or not (a norm, a mean, a softmax).
    """

    node: Node
    axes: list[Axis]
    exact_on_zeros: bool


@dataclass(slots=True)
class Scope:
    """What rules write to while they run over one or more recordings of the same model."""

    observations: list[Observation] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    scales: list[tuple[Node, Expression]] = field(default_factory=list)
    plain: list[tuple[str, Expression]] = field(default_factory=list)
    same_counts: list[list[Axis]] = field(default_factory=list)
    turns: set[Axis] = field(default_factory=set)
    unknown: list[Node] = field(default_factory=list)
    heads: list[Axis] = field(default_factory=list)
    head_widths: list[Axis] = field(default_factory=list)
    aligned: list[tuple[Axis, int, str]] = field(default_factory=list)
    literals_bind: bool = True
    node: Node | None = None

    @property
    def where(self) -> str:
        """Source line of the current call."""
        return self.node.where if self.node is not None else ""

    def unify(self, first: Axis, second: Axis) -> None:
        """State that two axes are the same."""
        algebra.unify(first, second, self.where)

    def freeze(self, axes: Iterable[Axis], reason: str) -> None:
        """Forbid removal from the axes."""
        for axis in axes:
            algebra.freeze(axis, reason, self.where)

    def leaf(self, size: int, frozen: str | None = None) -> Axis:
        """Return a new axis."""
        return algebra.leaf(size, frozen, self.where if frozen else None)

    def align(self, axis: Axis, multiple: int) -> None:
        """State that the size of ``axis`` must stay a multiple, as kernels ask for; not where it is none now."""
        if axis.size % multiple == 0:
            self.aligned.append((axis, multiple, self.where))

    def mix(self, axes: Iterable[Axis], *, exact_on_zeros: bool = False) -> None:
        """Note that the current call combines the indices of ``axes``."""
        free = [axis for axis in axes if axis.size > 1]
        if free and self.node is not None:
            self.mixings.append(Mixing(self.node, free, exact_on_zeros))

    def observe(self, number: int, axes: Sequence[Axis]) -> None:
        """Note that an integer argument of the current call must equal the summed size of ``axes``.

        Args:
            number: The plain integer as the operator got it (negative: counted from the end).
            axes: The axes it sizes.
        """
        if self.node is not None:
            self._observe(expressions_for(self.node, [number])[0], number, axes)

    def number(self, name: str, axes: Sequence[Axis]) -> None:
        """State that a number of the current opaque module (``"channels"``) is the summed size of ``axes``."""
        if self.node is not None and isinstance(self.node.target, OpaqueTarget):
            target = self.node.target
            label = f"{target.path}.{name}" if target.path else name
            own = Attribute(target.owner, name, None, label, int(getattr(target.module, name)))
            self.observations.append(Observation(own, list(axes), 1, self.node))

    def observe_each(self, numbers: Sequence[int], axes: Sequence[Axis]) -> None:
        """Note that each integer of a list argument sizes the axis at the same place; -1 sizes nothing."""
        if self.node is None:
            return
        for expression, number, axis in zip(expressions_for(self.node, numbers), numbers, axes, strict=True):
            if number != -1:
                self._observe(expression, number, [axis])

    def observe_sums(self, numbers: Sequence[int], axes: Sequence[Sequence[Axis]]) -> None:
        """Note that consecutive integers of the current call equal the summed sizes of ``axes``; none: no size."""
        if self.node is None:
            return
        for expression, number, own in zip(expressions_for(self.node, numbers), numbers, axes, strict=True):
            if own:
                self._observe(expression, number, own)

    def _observe(self, expression: Expression, number: int, axes: Sequence[Axis]) -> None:
        if any(axis.size > 1 for axis in axes):
            self.observations.append(Observation(expression, list(axes), -1 if number < 0 else 1, self.node))


def expressions_for(node: Node, numbers: Sequence[int]) -> list[Expression]:
    """Return the expression behind each of the integers of one argument of a call.

    The call's own integers are matched in order where they occur as one run; otherwise each number by its value.
    A number without a tag is a literal and returned as it is.
    """
    given = node.sizes or []
    if not numbers or all(isinstance(item, int) for item in given):
        return list(numbers)
    values = [recorded_value(item) for item in given]
    wanted = list(numbers)
    for start in range(len(values) - len(wanted) + 1):
        if values[start : start + len(wanted)] == wanted:
            run = given[start : start + len(wanted)]
            if len(wanted) > 1 or not isinstance(run[0], int):
                return run
    tagged = {
        value: item
        for value, item in zip(values[::-1], given[::-1], strict=True)
        if not isinstance(item, int)
    }
    return [tagged.get(number, number) for number in wanted]


def recorded_value(expression: Expression) -> float:
    """Return the value an expression had when it was recorded."""
    return evaluate(expression, lambda v: v.value.shape[v.dim] if isinstance(v, Dimension) else v.number)


Rule = Callable[[Node, Scope], None]
_RULES: dict[str, Rule] = {}
_USER_RULES: dict[str, Rule] = {}
_MODULE_RULES: dict[type[nn.Module], Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule of the library for the named operators."""

    def decorate(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return decorate


def register_axis_rule(*targets: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule of your own for operators, or for modules that are opaque to the recording.

    A rule for an operator takes the place of the library's where there is one. A module of a registered class (or a
    subclass) becomes a single node, whatever its code does: ``node.data`` holds its input tensors,
    ``node.parameters`` its parameters and buffers by name. Its code then runs on real values.

    The rule gets the :class:`~dwindle.graph.nodes.Node` and the :class:`Scope`, relates the axes of the
    arguments (``scope.unify``, ``scope.freeze``, ``scope.mix``) and sets ``node.outputs[i].axes``, one axis a
    dimension.

    Args:
        targets: Operator names without namespace and overload, such as ``"my_scan"`` for ``mylib::my_scan``, or
            classes of modules.
    """

    def decorate(function: Rule) -> Rule:
        for target in targets:
            if isinstance(target, str):
                _USER_RULES[target] = function
            else:
                _MODULE_RULES[target] = function
        return function

    return decorate


def opaque_kinds() -> tuple[type[nn.Module], ...]:
    """Classes of modules that have a rule of their own."""
    return tuple(_MODULE_RULES)


def rule_for(node: Node) -> Rule | None:
    """Return the rule of a call: the user's, the library's, or the element-wise one for pointwise operators."""
    if isinstance(node.target, OpaqueTarget):
        kinds = node.target.kind.__mro__
        return next((_MODULE_RULES[kind] for kind in kinds if kind in _MODULE_RULES), None)
    name = node.name
    found = _USER_RULES.get(name) or _RULES.get(name)
    if found is None and name.endswith("_"):
        found = _RULES.get(name[:-1])
    if found is None and torch.Tag.pointwise in node.target.tags:
        return _RULES["<pointwise>"]
    return found


def freeze_everything(node: Node, scope: Scope, reason: str) -> None:
    """The safe answer: nothing that goes into or comes out of this call may be pruned."""
    for value in node.inputs():
        scope.freeze(value.axes, reason)
    for value in node.outputs:
        value.axes = [scope.leaf(size, reason) for size in value.shape]


def drop(axes: Sequence[Axis], dims: Iterable[int], keepdim: bool) -> list[Axis]:
    """Return ``axes`` without ``dims`` (or with size-1 axes in their place)."""
    removed = set(dims)
    if keepdim:
        return [algebra.UNIT if dim in removed else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in removed]


def normalize_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Return non-negative dimensions; None means all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    if isinstance(dims, int):
        dims = [dims]
    return [dim % max(rank, 1) for dim in dims]


def single(axis: Axis, scope: Scope) -> None:
    """Cut an axis into single indices, because each is used for itself."""
    if axis.size <= _MANY:
        algebra.split(axis, [1] * axis.size, scope.where)
    scope.freeze([axis], "single indices of it are used by number")


__all__ = [
    "Mixing",
    "Observation",
    "Rule",
    "Scope",
    "Value",
    "drop",
    "expressions_for",
    "freeze_everything",
    "normalize_dims",
    "recorded_value",
    "register_axis_rule",
    "rule",
    "rule_for",
    "single",
    "values_in",
]
