"""What is known while a model is recorded: its operators so far, and which value each tensor stands for."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from dwindle.graph.expressions import Expression, Operation
from dwindle.graph.module_calls import ModuleCall
from dwindle.graph.nodes import Node, Value
from dwindle.graph.opaque import OpaqueTarget
from dwindle.graph.trace import Choice

_LIBRARY_FOLDERS = (torch.__path__[0] + os.sep, __file__.rsplit("graph", 1)[0])


class Recording:
    """State shared by the two modes while a model runs."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[int, Value] = {}
        self.keep_alive: list[torch.Tensor] = []
        self.equalities: list[tuple[Expression, Expression]] = []
        self.sizes: list[Expression] | None = None
        self.floats: list[Expression] | None = None
        self.modules: list[str] = [""]
        self.calls: list[ModuleCall] = []
        self.plain: list[tuple[str, Expression]] = []
        self.makes_tensor = False
        self.choices: list[Choice] = []
        self.turned: int | None = None
        self.lost_numbers = False

    def lose(self, expression: Expression) -> None:
        """Note that a tagged number became a plain float; the operators that make tensors tell of theirs."""
        if not self.makes_tensor:
            self.plain.append((where(), expression))

    def known_value(self, tensor: torch.Tensor) -> Value | None:
        """Return the value that stands for ``tensor`` now; None for a tensor from nowhere."""
        value = self.known.get(id(tensor))
        return tensor.__dict__.get("_dwindle_value") if value is None else value

    def value_of(self, tensor: torch.Tensor) -> Value:
        """Return the value that stands for ``tensor`` now; a tensor from nowhere becomes a constant."""
        value = self.known_value(tensor)
        if value is None:
            value = Value("constant", "", tuple(int(s) for s in tensor.size()), tensor.dtype, tensor=tensor)
            self.bind(tensor, value, keep=True)
            self.lost_numbers |= tensor.is_meta and tensor.numel() > 0
        return value

    def must_differ(self, left: Expression, right: Expression) -> None:
        """Note that two sizes were compared and found unequal: code that asks does something else otherwise."""
        self.equalities.append((Operation("differs", (left, right)), True))

    def write_opaque(
        self,
        target: OpaqueTarget,
        inputs: list[Any],
        tensors: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """Write down a call of an opaque module."""
        given = [self.value_of(item) if isinstance(item, torch.Tensor) else item for item in inputs]
        own = [self.value_of(tensor) for tensor in tensors]
        spec = "one" if len(results) == 1 else "list"
        node = Node(target, (given, own), {}, [], spec, target.path, where())
        for tensor in results:
            node.outputs.append(Value("result", "", tuple(tensor.shape), tensor.dtype, producer=node))
            self.bind(tensor, node.outputs[-1])
        self.nodes.append(node)

    def bind(self, tensor: torch.Tensor, value: Value, keep: bool = False) -> None:
        """State that ``tensor`` now holds ``value``."""
        if keep or id(tensor) in self.known:
            self.known[id(tensor)] = value
            self.keep_alive.append(tensor)
        else:
            tensor.__dict__["_dwindle_value"] = value


def where() -> str:
    """Source line of the innermost frame outside torch and dwindle."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
