"""Sizes that torch's own modules keep as numbers: ``out_features`` is the size of dimension 0 of ``weight``.

Code that reads such a number for another purpose (``zeros(batch, layer.out_features)``) ties that purpose to the
weight, since surgery keeps the number true to the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dwindle.graph.axes import Axis
from dwindle.graph.expressions import Attribute, Expression, variables
from dwindle.graph.rules.registry import Observation, Scope
from dwindle.graph.trace import Trace

Place = tuple[str, int]


def own_sizes(module: nn.Module) -> dict[str, Place]:
    """Return, for each number of a module that is the size of a dimension, the parameter and the dimension."""
    if isinstance(module, nn.Linear):
        return {"out_features": ("weight", 0), "in_features": ("weight", 1)}
    if isinstance(module, _ConvNd):
        if module.groups > 1:
            return {} if isinstance(module, _ConvTransposeNd) else {"out_channels": ("weight", 0)}
        first, second = ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")
        return {f"{first}_channels": ("weight", 0), f"{second}_channels": ("weight", 1)}
    if isinstance(module, _NormBase):
        return {"num_features": ("running_mean" if module.weight is None else "weight", 0)}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)}
    if isinstance(module, nn.RNNBase):
        sizes: dict[str, Place] = {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}
        if module.proj_size:
            sizes.update(hidden_size=("weight_hr_l0", 1), proj_size=("weight_hr_l0", 0))
        return sizes
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}
    if isinstance(module, nn.Bilinear):
        return {"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)}
    return {}


def observe_own_sizes(traces: Iterable[Trace], axes: Mapping[str, list[Axis]], scope: Scope) -> None:
    """Note which axis each number has that the recorded code used and that describes a weight of torch's own modules.

    Args:
        traces: The recordings.
        axes: Axes of each parameter and buffer by name.
        scope: What the rules observed; the notes go there.
    """
    traces = list(traces)
    used = {
        variable
        for expression in _expressions(traces, scope)
        for variable in variables(expression)
        if isinstance(variable, Attribute)
    }
    owners: dict[int, tuple[str, Any]] = {}
    for trace in traces:
        owners.update(trace.owners)
    for attribute in sorted(used, key=lambda attribute: attribute.label):
        path, owner = owners.get(attribute.owner, ("", None))
        if not isinstance(owner, nn.Module) or attribute.index is not None:
            continue
        name, dim = own_sizes(owner).get(attribute.key, ("", 0))
        own = axes.get(f"{path}.{name}" if path else name)
        if own is not None and dim < len(own) and own[dim].size == attribute.number:
            scope.observations.append(Observation(attribute, [own[dim]], 1, None))


def _expressions(traces: list[Trace], scope: Scope) -> Iterator[Expression]:
    for observation in scope.observations:
        yield observation.expression
    for _, scale in scope.scales:
        yield scale
    for trace in traces:
        for pair in trace.equalities:
            yield from pair
