"""Axes as a criterion sees them: which dimensions of which parameters share an axis, and what each does with it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.graph.analysis import Analysis, AxisInfo
from dwindle.graph.nodes import Value, values_in
from dwindle.pruning.coupling import Coupling

_ADDING = frozenset({"add", "add_", "sub", "sub_", "rsub"})


@dataclass(frozen=True, eq=False)
class AxisPlace:
    """One dimension of one parameter that shares an axis.

    Attributes:
        name: The parameter.
        dim: The dimension.
        index: Which index of the axis stands at each position (-1 is none of it), int64.
        reads: Whether the dimension is summed over (the inputs of a linear layer or a convolution).
        shifts: Whether the parameter is only added (a bias).
    """

    name: str
    dim: int
    index: Tensor
    reads: bool
    shifts: bool

    def onto(self, scores: Tensor, size: int) -> Tensor:
        """Add up the scores of the positions of each index.

        Args:
            scores: One for each position of the dimension.
            size: Number of indices of the axis.

        Returns:
            ``[size]`` in float64, on the scores' device; 0 for an index that stands nowhere.
        """
        index = self.index.to(scores.device)
        here = index >= 0
        whole = torch.zeros(size, dtype=torch.float64, device=scores.device)
        return whole.index_add_(0, index[here], scores[here].double())


@dataclass(frozen=True, eq=False)
class SharedAxis:
    """An axis and every parameter that has it.

    Attributes:
        key: By which the caller knows it.
        size: Number of indices.
        places: Where it is.
    """

    key: Hashable
    size: int
    places: tuple[AxisPlace, ...]

    @property
    def gated(self) -> tuple[AxisPlace, ...]:
        """The places where one factor on each index acts on the whole model: all readers, or else all others.

        Scaling what every reader gets is the same as scaling what every maker gives (and the norms and biases behind
        it), so that one of the two is all it takes.
        """
        reading = tuple(place for place in self.places if place.reads)
        return reading or self.places


def shared_axes(model: nn.Module | None, analysis: Analysis, infos: Sequence[AxisInfo]) -> list[SharedAxis]:
    """Return the axes of an analysis as criteria see them.

    Args:
        model: The analysed model; with None it is not known which places read.
        analysis: Its axes.
        infos: Those that are wanted.
    """
    coupling = None if model is None else Coupling(model, analysis)
    shifts = shifting_parameters(analysis)
    axes = []
    for info in infos:
        places = []
        for name, dim in info.parameter_dims:
            value = analysis.trace.parameters.get(name)
            if value is not None and value.kind != "parameter" and len(value.shape) < 2:
                continue  # running statistics
            index = analysis.positions(name, dim).get(info.axis)
            if index is not None:
                reads = coupling is not None and coupling.is_reader(name, dim)
                places.append(AxisPlace(name, dim, index, reads, name in shifts))
        axes.append(SharedAxis(info.axis, info.size, tuple(places)))
    return axes


def shifting_parameters(analysis: Analysis) -> set[str]:
    """Return the parameters that are only ever added: biases, whatever they are called."""
    added: set[str] = set()
    others: set[str] = set()
    for node in analysis.trace.live_nodes():
        biases = set(_names(values_in(node.argument("bias")))) if node.parameters == {} else set()
        if node.name in _ADDING:
            biases.update(_names(node.inputs()))
        added.update(biases)
        others.update(name for name in _names(node.inputs()) if name not in biases)
    return added - others


def _names(values: Iterable[Value]) -> list[str]:
    return [value.name for value in values if value.kind == "parameter"]
