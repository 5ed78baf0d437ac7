"""What a recording holds: values (tensors), nodes (operator calls) and the observations made along the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.expressions import Dimension, Expression, variables
from dwindle.graph.opaque import OpaqueTarget

if TYPE_CHECKING:
    from dwindle.graph.module_calls import ModuleCall


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


@dataclass(frozen=True, slots=True)
class Choice:
    """A place where Python read the value of a tensor.

    Attributes:
        where: Source line.
        free: Whether it was read as true or false, so that the other way can be tried.
    """

    where: str
    free: bool


@dataclass(slots=True)
class Trace:
    """A recording of one forward pass.

    Attributes:
        nodes: Operator calls in order.
        parameters: Values of parameters and buffers by name (the first name, where one is shared).
        inputs: Values of the tensors among the example inputs, in flattening order.
        outputs: Values of the outputs whose shape must stay.
        input_spec: Tree structure of ``(args, kwargs)``.
        flat_inputs: The flattened example inputs (tensors and others).
        output_spec: Tree structure of the model's output.
        flat_outputs: The flattened outputs, tensors as values.
        equalities: Pairs of expressions that the user's code compared and found equal.
        training: Whether the model was recorded in training mode.
        executed_on: ``"meta"`` or ``"real"``.
        owners: Path and object behind each attribute owner's identity.
        calls: Calls of modules, in the order in which they began.
        plain: Source line and expression of tagged numbers whose tag was lost: what became of them is not known.
        assigned: What the forward pass put in the place of a plain tensor attribute (an old-style weight norm puts
            the weight there), by name.
        choices: Where Python read values of tensors, in order.
        notes: What the user should know about the recording.
        caches: Path and name of dictionaries of tensors that the model fills anew when they are empty.
    """

    nodes: list[Node]
    parameters: dict[str, Value]
    inputs: list[Value]
    outputs: list[Value]
    input_spec: Any
    flat_inputs: list[Any]
    output_spec: Any
    flat_outputs: list[Any]
    equalities: list[tuple[Expression, Expression]]
    training: bool
    executed_on: str = "real"
    owners: dict[int, tuple[str, Any]] = field(default_factory=dict)
    calls: list[ModuleCall] = field(default_factory=list)
    plain: list[tuple[str, Expression]] = field(default_factory=list)
    assigned: dict[str, Value] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    caches: list[tuple[str, str]] = field(default_factory=list)

    def live_nodes(self, *, sizes: bool = False) -> list[Node]:
        """Return the nodes that the outputs depend on; calls that change a tensor in place always count.

        Args:
            sizes: Also nodes of which only the shape of a result is used.
        """
        needed = {id(value) for value in self.outputs}
        needed.update(id(value) for value in self.flat_outputs if isinstance(value, Value))
        live: list[Node] = []
        for node in reversed(self.nodes):
            mutates = node.target._schema.is_mutable
            if mutates or any(id(value) in needed for value in node.outputs):
                live.append(node)
                needed.update(id(value) for value in node.inputs())
                if sizes:
                    needed.update(_asked(node))
        return live[::-1]


def _asked(node: Node) -> Iterator[int]:
    """Identities of the tensors whose shape a call uses."""
    for expression in node.sizes or ():
        for variable in variables(expression):
            if isinstance(variable, Dimension):
                yield id(variable.value)
