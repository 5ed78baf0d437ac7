"""Values (tensors) and nodes (operator calls) of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.expressions import Expression
from dwindle.graph.opaque import OpaqueTarget


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of a recording.

    Attributes:
        kind: ``"parameter"``, ``"buffer"``, ``"input"``, ``"constant"`` or ``"result"``.
        name: Parameter or buffer name, or the path of an input; empty for results.
        shape: Sizes as recorded.
        dtype: Element type.
        axes: One axis a dimension, set when the rules have run.
        producer: The node that made it; None unless it is a result.
        tensor: The tensor itself, kept for constants only.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: list[Axis] = field(default_factory=list)
    producer: Node | None = None
    tensor: torch.Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"<{self.kind} {self.name or (self.producer.name if self.producer else '')} {list(self.shape)}>"
        )

    @property
    def is_floating(self) -> bool:
        """Whether the elements are floating point numbers."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(eq=False, slots=True)
class Node:
    """One call of one ATen operator, or of one opaque module.

    Attributes:
        target: The operator overload, or the :class:`OpaqueTarget`.
        args: Positional arguments; tensors are :class:`Value` objects.
        kwargs: Keyword arguments, likewise.
        outputs: The results, flattened.
        output_spec: How ``outputs`` nest: ``"one"``, ``"list"`` or ``"none"``.
        module: Path of the module that was running.
        where: Source line in the user's code, ``"file.py:12"``.
        sizes: The integers among the call's arguments, in order, as expressions (plain integers are literals).
        floats: Tagged floats among the call's arguments.
        strides: How the first argument lay in memory, for operators that address memory.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    output_spec: str
    module: str
    where: str
    sizes: list[Expression] | None = None
    floats: list[Expression] | None = None
    strides: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"<{self.name} in {self.module or 'the root module'} at {self.where}>"

    @property
    def name(self) -> str:
        """Name of the operator without namespace and overload, such as ``"conv2d"``."""
        return str(self.target._schema.name.split("::")[1])

    @property
    def output(self) -> Value:
        """The first result."""
        return self.outputs[0]

    @property
    def data(self) -> list[Value]:
        """The tensors among the arguments; of an opaque module only its inputs."""
        return list(values_in(self.args[0]) if isinstance(self.target, OpaqueTarget) else self.inputs())

    @property
    def parameters(self) -> dict[str, Value]:
        """Parameters and buffers of an opaque module by their names in it; empty for operators."""
        if not isinstance(self.target, OpaqueTarget):
            return {}
        return dict(zip(self.target.names, self.args[1], strict=True))

    def argument(self, name: str, default: Any = None) -> Any:
        """Return the argument called ``name`` in the operator's schema."""
        for position, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if not argument.kwarg_only and position < len(self.args):
                    return self.args[position]
                if name in self.kwargs:
                    return self.kwargs[name]
                return argument.default_value if argument.has_default_value() else default
        return default

    def inputs(self) -> Iterator[Value]:
        """Yield every tensor among the arguments, in order."""
        for argument in (*self.args, *self.kwargs.values()):
            yield from values_in(argument)


def values_in(argument: Any) -> Iterator[Value]:
    """Yield the values in a (nested) argument."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from values_in(item)
