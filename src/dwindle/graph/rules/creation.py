"""Tensors made from nothing: their sizes are observed, their contents are the same at every index."""

from __future__ import annotations

from dwindle.graph.nodes import Node
from dwindle.graph.rules.registry import Scope, rule

#: Operators whose size list gives one new axis a dimension.
CREATIONS = (
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
    "empty_strided", "new_empty_strided", "randint",
)  # fmt: skip


@rule(*CREATIONS)
def create(node: Node, scope: Scope) -> None:
    """One new axis a dimension; each size is observed."""
    for output in node.outputs:
        output.axes = [scope.leaf(size) for size in output.shape]
        scope.observe_each(output.shape, output.axes)
    for expression in node.floats or []:
        scope.scales.append((node, expression))


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "hann_window",
    "hamming_window",
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_size",
    "_functional_assert_async",
    "allclose",
    "is_same_size",
)
def numbers(node: Node, scope: Scope) -> None:
    """Every index has its own value: frozen."""
    for value in node.inputs():
        scope.freeze(value.axes, f"{node.name} reads it")
    for output in node.outputs:
        output.axes = [scope.leaf(size, f"made by {node.name}") for size in output.shape]
