"""Which axes shrink exactly: plain zeros at the removed indices of the parameters are all the masking they need.

An axis is *inexact* when an operator combines its indices in a way that zeros do not leave unchanged: a norm, a mean,
a softmax over it, or a product of activations where the removed indices do not arrive as zeros (``elu(q) + 1``). On
exact axes a small model can be held against a plainly masked copy of the original, with no help of the analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.registry import Mixing, Scope, rule_for
from dwindle.graph.trace import Trace

_NOTHING: frozenset[Axis] = frozenset()

#: Results hold elements of the arguments, or reductions of elements with equal other indices: zeros stay zeros.
_MOVES = frozenset(
    {
        "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
        "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "expand",
        "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "cat", "concat", "concatenate", "stack",
        "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "select",
        "slice", "narrow", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "glu",
        "prelu", "_prelu_kernel", "sum", "mean", "amax", "amin", "var", "std", "prod", "norm", "linalg_vector_norm",
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
        "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
        "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "roll", "flip", "index", "index_select",
        "_unsafe_index", "gather", "embedding", "im2col", "col2im", "unfold", "triu", "tril", "cumsum", "dropout",
    }
)  # fmt: skip

#: Products: where the factors stand among the tensor arguments, and the bias behind them.
_PRODUCTS: dict[str, tuple[slice, slice]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"), (slice(2), slice(2, 3))),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (slice(2), slice(2, 3))),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "scaled_dot_product_attention"), (slice(2), slice(0))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), (slice(1, 3), slice(1))),
    "einsum": (slice(None), slice(0)),
    "bilinear": (slice(3), slice(3, 4)),
}  # fmt: skip

_NORMS = frozenset(
    {"batch_norm", "native_batch_norm", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
     "native_group_norm", "instance_norm"}
)  # fmt: skip


def inexact_leaves(scope: Scope, traces: Iterable[Trace]) -> dict[Axis, str]:
    """Return the leaves that are not exact, each with the operator and the source line that make it so.

    Args:
        scope: What the rules observed.
        traces: The recordings the rules ran over.
    """
    reasons: dict[Axis, str] = {}
    undecided: list[tuple[Mixing, Axis]] = []
    for mixing in scope.mixings:
        for axis in mixing.axes:
            for leaf in axis.leaves():
                if not mixing.exact_on_zeros:
                    reasons.setdefault(leaf, f"{mixing.node.name} at {mixing.node.where}")
                elif leaf.frozen is None:
                    undecided.append((mixing, leaf))
    undecided = [(mixing, leaf) for mixing, leaf in undecided if leaf not in reasons]
    if undecided:
        zeros = _Zeros(traces)
        for mixing, leaf in undecided:
            if not zeros.vanish_in(mixing.node, leaf):
                reasons.setdefault(leaf, f"{mixing.node.name} at {mixing.node.where}")
    return reasons


class _Zeros:
    """For each tensor, the leaves whose removed indices arrive there as zeros when parameters are masked."""

    def __init__(self, traces: Iterable[Trace]) -> None:
        self.known: dict[int, frozenset[Axis]] = {}
        self.spoilt: set[Axis] = set()
        self.probes: dict[Any, bool] = {}
        for trace in traces:
            for value in trace.parameters.values():
                # buffers (running statistics) are not masked
                self.known[id(value)] = _leaves(value) if value.kind == "parameter" else _NOTHING
            for node in trace.live_nodes():
                self._follow(node)

    def of(self, value: Value) -> frozenset[Axis]:
        """Leaves on which ``value`` is zero wherever something was removed."""
        return self.known.get(id(value), _NOTHING)

    def vanish_in(self, node: Node, leaf: Axis) -> bool:
        """Whether the removed indices of ``leaf`` add nothing to the sum that ``node`` takes over it."""
        if leaf in self.spoilt:
            return False
        values = list(node.inputs())
        if node.name in _PRODUCTS:
            return any(leaf in self.of(value) for value in values[_PRODUCTS[node.name][0]])
        return all(leaf in self.of(value) for value in values if leaf in _leaves(value))

    def _follow(self, node: Node) -> None:
        name = node.name if node.name in _MOVES or node.name in _PRODUCTS else node.name.removesuffix("_")
        vanishes = self._test(node, name)
        for output in node.outputs:
            self.known[id(output)] = frozenset(leaf for leaf in _leaves(output) if vanishes(leaf))
        if node.target._schema.is_mutable:
            # what was zero before may be seen through another view of the same memory
            for value in list(node.inputs())[:1]:
                self.spoilt |= {leaf for leaf in self.of(value) if not vanishes(leaf)}

    def _test(self, node: Node, name: str) -> Callable[[Axis], bool]:
        """How to find out whether the results of a call are zero at the removed indices of a leaf."""
        values = list(node.inputs())
        if name == "scaled_dot_product_attention":
            return lambda leaf: leaf in self.of(values[2])
        if name in _PRODUCTS:
            factors, bias = (values[place] for place in _PRODUCTS[name])
            return lambda leaf: (
                any(leaf in self.of(value) for value in factors)
                and all(leaf in self.of(value) for value in bias)
            )
        if name in _NORMS:
            scales = [node.argument("weight"), node.argument("bias")]
            given = [value for value in scales if isinstance(value, Value)]
            return lambda leaf: scales[0] is not None and all(leaf in self.of(value) for value in given)
        if name in _MOVES or (name in ("pad", "constant_pad_nd") and not node.argument("value")):
            return lambda leaf: all(leaf in self.of(value) for value in values if leaf in _leaves(value))
        rule = rule_for(node)
        if rule is None or rule.__name__ != "elementwise":
            return lambda leaf: False
        return lambda leaf: self._probe(node, leaf)

    def _probe(self, node: Node, leaf: Axis) -> bool:
        """Run an element-wise operator on zeros (where they arrive) and noise (elsewhere)."""
        values = list(node.inputs())
        pattern = tuple(leaf in self.of(value) for value in values)
        if not any(pattern):
            return False
        key = (node.target, pattern, repr([_shown(item) for item in node.args]))
        if key not in self.probes:
            self.probes[key] = _stays_zero(node, values, pattern)
        return self.probes[key]


def _leaves(value: Value) -> frozenset[Axis]:
    return frozenset(leaf for axis in value.axes for leaf in axis.leaves())


def _shown(item: Any) -> str:
    return "tensor" if isinstance(item, Value) else repr(item)


def _stays_zero(node: Node, values: list[Value], zero: tuple[bool, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    where = {id(value): at_zero for value, at_zero in zip(values, zero, strict=True)}

    def swap(item: Any) -> Any:
        if isinstance(item, Value):
            if where[id(item)]:
                return torch.zeros(64, dtype=torch.float64 if item.is_floating else item.dtype)
            noise = torch.randn(64, generator=generator, dtype=torch.float64)
            return noise if item.is_floating else (noise > 0).to(item.dtype)
        if isinstance(item, list | tuple):
            return [swap(inner) for inner in item]
        return item

    ignored = ("device", "layout", "memory_format", "pin_memory")
    try:
        with torch.no_grad():
            result = node.target(
                *(swap(item) for item in node.args),
                **{key: swap(item) for key, item in node.kwargs.items() if key not in ignored},
            )
    except Exception:
        return False
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    return all(
        isinstance(one, torch.Tensor) and not one.is_meta and bool((one == 0).all()) for one in results
    )


__all__ = ["inexact_leaves"]
