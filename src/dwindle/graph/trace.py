"""What a recording holds: nodes and values, and the observations made along the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dwindle.graph.expressions import Dimension, Expression, variables
from dwindle.graph.module_calls import ModuleCall
from dwindle.graph.nodes import Node, Value


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
