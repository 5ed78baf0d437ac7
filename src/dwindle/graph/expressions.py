"""Integers that remember where they came from.

While a model is recorded, the integers of its modules and configs, and the sizes read from tensors, are
*tagged*: they behave like the plain number but carry an expression. The tags that arrive at a reshape, split or
expand then name the owner of that size, so that surgery knows which attribute to correct, instead of guessing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number held by a module or a config: ``owner.key`` or ``owner.key[index]``.

    Attributes:
        owner: Identity of the object that holds it (a module or a config object).
        key: Name of the attribute.
        index: Position when the attribute is a tuple or list of integers.
        label: How to print it, ``"layer1.0.attention.num_heads"``.
        number: Its value when it was recorded.
    """

    owner: int
    key: str
    index: int | None
    label: str
    number: int | float


@dataclass(frozen=True, slots=True)
class Dimension:
    """The size of one dimension of one recorded tensor."""

    value: Any
    dim: int


@dataclass(frozen=True, slots=True)
class Operation:
    """An arithmetic expression over other expressions and plain numbers."""

    name: str
    operands: tuple[Any, ...]


Expression = Attribute | Dimension | Operation | int | float

#: The arithmetic of expressions, by name.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "pow": operator.pow,
    "mod": operator.mod,
    "neg": operator.neg,
    "sqrt": math.sqrt,
    "differs": operator.ne,
    "float": float,
    "int": int,
}


def expression_of(number: Any) -> Expression:
    """Return the expression behind a tagged number, or the plain number itself."""
    return number.expression if isinstance(number, TaggedInt | TaggedFloat) else number


def variables(expression: Expression) -> Iterator[Attribute | Dimension]:
    """Yield the attributes and dimensions that an expression depends on."""
    if isinstance(expression, Operation):
        for operand in expression.operands:
            yield from variables(operand)
    elif isinstance(expression, Attribute | Dimension):
        yield expression


def evaluate(expression: Expression, value_of: Callable[[Attribute | Dimension], Any]) -> Any:
    """Evaluate an expression with ``value_of`` giving the value of each variable."""
    if isinstance(expression, Operation):
        return FUNCTIONS[expression.name](*(evaluate(operand, value_of) for operand in expression.operands))
    if isinstance(expression, Attribute | Dimension):
        return value_of(expression)
    return expression


def describe(expression: Expression) -> str:
    """Return a readable form such as ``"size(1) // attention.num_heads"``."""
    if isinstance(expression, Attribute):
        return expression.label
    if isinstance(expression, Dimension):
        return f"size({expression.dim})"
    if isinstance(expression, Operation):
        signs = {
            "add": "+",
            "sub": "-",
            "mul": "*",
            "floordiv": "//",
            "truediv": "/",
            "pow": "**",
            "mod": "%",
        }
        parts = [describe(operand) for operand in expression.operands]
        if expression.name in signs:
            return f"({parts[0]} {signs[expression.name]} {parts[1]})"
        return f"{expression.name}({', '.join(parts)})"
    return str(expression)


#: Called with (left, right) expressions whenever two tagged integers compare equal while recording.
on_equal: Callable[[Expression, Expression], None] | None = None

#: Called likewise when two tagged integers compare unequal: code that asks may do something else where they agree.
on_unequal: Callable[[Expression, Expression], None] | None = None


def _plain(number: Any) -> Any:
    """The number itself, without its tag and without :data:`on_plain` being told."""
    return float.__pos__(number) if isinstance(number, float) else int.__pos__(number)


def _binary(
    name: str, function: Callable[[Any, Any], Any], reflected: bool = False
) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        mine, theirs = _plain(self), _plain(other)
        result = function(theirs, mine) if reflected else function(mine, theirs)
        operands = (
            (expression_of(other), expression_of(self))
            if reflected
            else (expression_of(self), expression_of(other))
        )
        return tag(result, Operation(name, operands))

    return method


def tag(number: Any, expression: Expression) -> Any:
    """Attach ``expression`` to a plain number. Booleans and other types pass unchanged."""
    if type(number) is int:
        return TaggedInt(number, expression)
    if type(number) is float:
        return TaggedFloat(number, expression)
    return number


class _Arithmetic:
    """Arithmetic shared by tagged integers and floats."""

    __slots__ = ()
    __add__ = _binary("add", operator.add)
    __radd__ = _binary("add", operator.add, reflected=True)
    __sub__ = _binary("sub", operator.sub)
    __rsub__ = _binary("sub", operator.sub, reflected=True)
    __mul__ = _binary("mul", operator.mul)
    __rmul__ = _binary("mul", operator.mul, reflected=True)
    __floordiv__ = _binary("floordiv", operator.floordiv)
    __rfloordiv__ = _binary("floordiv", operator.floordiv, reflected=True)
    __truediv__ = _binary("truediv", operator.truediv)
    __rtruediv__ = _binary("truediv", operator.truediv, reflected=True)
    __pow__ = _binary("pow", operator.pow)
    __rpow__ = _binary("pow", operator.pow, reflected=True)
    __mod__ = _binary("mod", operator.mod)
    __rmod__ = _binary("mod", operator.mod, reflected=True)


#: Called with the expression of a tagged number that becomes a plain float, so that its tag is lost.
on_plain: Callable[[Expression], None] | None = None


def _plain_float(self: Any) -> float:
    if on_plain is not None:
        on_plain(self.expression)
    return float(int.__pos__(self)) if isinstance(self, int) else float.__pos__(self)


class TaggedInt(_Arithmetic, int):  # type: ignore[misc]
    """An ``int`` with an expression. Equal to and usable as the plain integer everywhere."""

    expression: Expression

    def __new__(cls, number: int, expression: Expression) -> TaggedInt:
        """Make a tagged copy of ``number``."""
        self = super().__new__(cls, number)
        self.expression = expression
        return self

    def __neg__(self) -> Any:
        return TaggedInt(-int(self), Operation("neg", (self.expression,)))

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other) is True if isinstance(other, int) else int(self) == other
        if same and on_equal is not None and isinstance(other, TaggedInt):
            on_equal(self.expression, other.expression)
        if not same and on_unequal is not None and isinstance(other, TaggedInt):
            on_unequal(self.expression, other.expression)
        return bool(same)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__
    __float__ = _plain_float

    def __reduce__(self) -> Any:
        return (int, (int(self),))

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


class TaggedFloat(_Arithmetic, float):  # type: ignore[misc]
    """A ``float`` with an expression, such as ``head_width ** -0.5``."""

    expression: Expression

    def __new__(cls, number: float, expression: Expression) -> TaggedFloat:
        """Make a tagged copy of ``number``."""
        self = super().__new__(cls, number)
        self.expression = expression
        return self

    def __neg__(self) -> Any:
        return TaggedFloat(-_plain(self), Operation("neg", (self.expression,)))

    __float__ = _plain_float

    def __reduce__(self) -> Any:
        return (float, (_plain(self),))

    def __deepcopy__(self, memo: Any) -> float:
        return float(_plain(self))


def tagged_sqrt(number: Any) -> Any:
    """``math.sqrt`` that keeps the tag; stands in for it while a model is recorded."""
    result = _plain_sqrt(_plain(number) if isinstance(number, _Arithmetic) else number)
    return (
        tag(result, Operation("sqrt", (expression_of(number),)))
        if isinstance(number, _Arithmetic)
        else result
    )


_plain_sqrt = math.sqrt


class _FloatKind(type):
    """Lets ``isinstance(x, KeepingFloat)`` mean ``isinstance(x, float)``."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, float)


class KeepingFloat(float, metaclass=_FloatKind):
    """``float`` that keeps the tag; stands in for it in torch's own functions while a model is recorded."""

    def __new__(cls, number: Any = 0.0) -> Any:
        """Convert as ``float`` does."""
        if isinstance(number, _Arithmetic):
            return TaggedFloat(_plain(number), Operation("float", (number.expression,)))  # type: ignore[attr-defined]
        return float(number)
