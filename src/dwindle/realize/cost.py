"""Parameters and multiply-accumulates of a model as a function of the counts of its axes, without building it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts, count_of
from dwindle.graph.nodes import Node, Value

_CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)


@dataclass(slots=True)
class CostModel:
    """Counts elements and multiply-accumulates from axes.

    Attributes:
        parameters: Axes and bytes an element of every parameter and buffer.
        products: One list of axes and a constant an operator; their product is its multiply-accumulates.
    """

    parameters: list[tuple[bool, list[Axis], int]]
    products: list[tuple[list[Axis], float]]

    @classmethod
    def of(cls, analysis: Analysis, without: Collection[str] = ()) -> CostModel:
        """Return the cost model of an analysed model (of the recorded batch, divided by it where it is known).

        Args:
            analysis: The analysed model.
            without: Paths of modules that are left out.
        """

        def stays(path: str) -> bool:
            return not any(path == gone or path.startswith(gone + ".") for gone in without)

        parameters = [
            (value.kind == "parameter", analysis.parameter_axes[name], value.dtype.itemsize)
            for name, value in analysis.trace.parameters.items()
            if stays(name)
        ]
        products: list[tuple[list[Axis], float]] = []
        for node in analysis.trace.live_nodes():
            products += _products(node) if stays(node.module) else []
        return cls(parameters, products)

    @classmethod
    def by_module(cls, analysis: Analysis) -> dict[str, CostModel]:
        """Return the multiply-accumulates of each module that has some, by path, in the order of the recording."""
        found: dict[str, CostModel] = {}
        for node in analysis.trace.live_nodes():
            products = _products(node)
            if products:
                found.setdefault(node.module, cls([], [])).products.extend(products)
        return found

    def elements(self, counts: Counts) -> int:
        """Number of parameter elements under ``counts``."""
        return sum(
            math.prod(count_of(axis, counts) for axis in axes)
            for trained, axes, _ in self.parameters
            if trained
        )

    def bytes(self, counts: Counts) -> int:
        """Bytes of all parameters and buffers under ``counts``."""
        return sum(
            math.prod(count_of(axis, counts) for axis in axes) * size for _, axes, size in self.parameters
        )

    def macs(self, counts: Counts) -> float:
        """Multiply-accumulates of one forward of the recorded inputs under ``counts``."""
        return sum(
            constant * math.prod(count_of(axis, counts) for axis in axes) for axes, constant in self.products
        )

    def prices(self, name: str, counts: Counts, axes: Collection[Axis]) -> dict[Axis, float]:
        """Return by how much the cost falls when an axis loses one more index, the others as they are.

        Args:
            name: The cost.
            counts: Of the axes now.
            axes: Leaves.
        """
        wanted = {axis.find() for axis in axes}
        found = dict.fromkeys(axes, 0.0)
        for terms, factor in self._terms(name):
            leaves = {leaf for axis in terms for leaf in axis.leaves()} & wanted
            for leaf in leaves:
                now = count_of(leaf, counts)
                fewer = {**counts, leaf: now - 1}
                whole, less = (math.prod(count_of(axis, own) for axis in terms) for own in (counts, fewer))
                found[leaf] += factor * (whole - less)
        return found

    def _terms(self, name: str) -> list[tuple[list[Axis], float]]:
        """The products whose sum, each times its factor, is a cost."""
        if name == "macs":
            return self.products
        return [
            (axes, 1.0 if name == "params" else float(size))
            for trained, axes, size in self.parameters
            if trained or name == "bytes"
        ]

    def cost(self, name: str, counts: Counts) -> float:
        """Cost by name: ``"macs"``, ``"params"`` or ``"bytes"``."""
        return {"macs": self.macs, "params": self.elements, "bytes": self.bytes}[name](counts)


def _products(node: Node) -> list[tuple[list[Axis], float]]:
    """Axes whose product is the number of multiply-accumulates of one call."""
    name = node.name
    if name in _CONVOLUTIONS:
        data, weight = list(node.inputs())[:2]
        transposed = "transpose" in name or bool(node.argument("transposed"))
        source = data if transposed else node.output
        channels = len(source.axes) - len(weight.axes) + 1
        positions = [*source.axes[:channels], *source.axes[channels + 1 :]]
        return [([*positions, *weight.axes], 1.0)]
    if name == "linear":
        data, weight = list(node.inputs())[:2]
        return [([*data.axes[:-1], *weight.axes], 1.0)]
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
        first = list(node.inputs())[1 if name in ("addmm", "baddbmm", "addmv") else 0]
        return [([*node.output.axes, first.axes[-1]], 1.0)]
    if name.startswith(("scaled_dot_product", "_scaled_dot_product")):
        query, key, value = list(node.inputs())[:3]
        scores = [*query.axes[:-1], key.axes[-2]]
        return [([*scores, query.axes[-1]], 1.0), ([*scores, value.axes[-1]], 1.0)]
    if name == "einsum":
        values = [value for value in node.inputs() if isinstance(value, Value)]
        every = {id(axis.find()): axis for value in values for axis in value.axes if axis.size > 1}
        return [(list(every.values()), 1.0)]
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        data = node.args[0]
        return [([*data.axes[:-1], *weight.axes], 1.0) for weight in node.args[2] if len(weight.axes) == 2]
    return []
