"""Finds out of a recording whether a stretch of it is ``x + branch(x)``, and which parameters make the branch zero.

One pass over the operators of the stretch keeps, for each value, two facts: that it is zero once certain
parameters are zero (a linear layer without weights, a product with a zero scale, a sum of zeros), and that it is
an earlier value, unchanged, once certain parameters are zero (a sum with a zero branch, a reshape, ``relu`` of what
is never negative).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dwindle.graph.nodes import Node, Value, values_in
from dwindle.graph.trace import Trace

#: Operators that keep all elements in row-major order.
_SAME_ORDER = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias",
     "detach", "to", "_to_copy", "view_as", "reshape_as", "type_as", "lift_fresh"}
)  # fmt: skip

#: Operators that put all elements in another order.
_OTHER_ORDER = frozenset(
    {"permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "roll", "flip", "numpy_T", "mT"}
)

#: Further operators of one tensor that give zeros for zeros.
_ZERO_TO_ZERO = frozenset(
    {"expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "slice", "select", "narrow",
     "index_select", "index", "gather", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unfold",
     "masked_select", "mean", "sum", "amax", "amin", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d",
     "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
     "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
     "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "relu", "relu6", "gelu", "silu", "tanh", "hardswish",
     "leaky_relu", "mish", "elu", "celu", "selu", "erf", "sin", "abs", "neg", "sqrt", "square", "prelu", "dropout",
     "native_dropout", "feature_dropout", "diff", "flip", "tril", "triu"}
)  # fmt: skip

#: Products: zero as soon as one of the factors (argument positions) is.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    "mul": (0, 1), "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "_grouped_mm": (0, 1),
    "scaled_dot_product_attention": (2,), "div": (0,), "_weight_norm": (1,),
}  # fmt: skip

#: A product and a bias: positions of the factors and of the bias.
_AFFINE: dict[str, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), ((1, 0), 2)),
    **dict.fromkeys(("conv_transpose3d", "convolution", "_convolution"), ((1, 0), 2)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), ((2, 1), 0)),
}  # fmt: skip

#: Norms: names of the scale and of the shift.
_NORMS = frozenset(
    {"batch_norm", "layer_norm", "native_layer_norm", "group_norm", "instance_norm", "rms_norm"}
)

#: Results that are zero from the start.
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})

#: Operators that write one tensor (or several) into another: zero when both are.
_WRITES: dict[str, tuple[int, ...]] = {
    "add": (0, 1), "sub": (0, 1), "copy": (1,), "where": (1, 2), "index_put": (0, 2), "index_add": (0, 3),
    "scatter_add": (0, 3), "index_copy": (0, 3), "slice_scatter": (0, 1), "select_scatter": (0, 1), "cat": (0,),
    "stack": (0,), "maximum": (0, 1), "minimum": (0, 1), "scatter_reduce": (0, 3),
}  # fmt: skip

_NEVER_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "softmax", "hardsigmoid", "exp", "abs", "square"})
_STAYS_NEVER_NEGATIVE = frozenset(
    {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d", "max_pool3d", "avg_pool3d",
     "dropout", "feature_dropout", "mean", "sum", "amax", "slice", "select", "index", "expand"}
)  # fmt: skip

_ALIASING = (_SAME_ORDER - {"clone", "_to_copy"}) | _OTHER_ORDER - {"roll", "flip"} | frozenset(
    {"expand", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unfold"}
)  # fmt: skip

Zeroed = frozenset[str]


@dataclass(frozen=True, slots=True)
class Identity:
    """A value that equals an earlier one once some parameters are zero.

    Attributes:
        root: The earlier value.
        zeroed: Names of the parameters.
        branches: What is added to it on the way.
        sums: Numbers of the operators that add.
        order: Where each element comes from, when elements were moved.
    """

    root: Value
    zeroed: Zeroed = frozenset()
    branches: tuple[Value, ...] = ()
    sums: tuple[int, ...] = ()
    order: torch.Tensor | None = None


class Stretches:
    """Answers whether stretches of one recording are residual.

    Args:
        trace: The recording.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.uses: dict[int, tuple[int, int]] = {}
        self.produced: dict[int, int] = {}
        self.never_negative: set[int] = set()
        for number, node in enumerate(trace.nodes):
            for value in node.inputs():
                first, _ = self.uses.get(id(value), (number, number))
                self.uses[id(value)] = first, number
            for value in node.outputs:
                self.produced[id(value)] = number
            self._note_sign(node)

    def _note_sign(self, node: Node) -> None:
        name = node.name.removesuffix("_")
        known = [id(value) in self.never_negative for value in node.inputs()]
        if (
            name in _NEVER_NEGATIVE
            or (known and known[0] and (name in _SAME_ORDER | _OTHER_ORDER | _STAYS_NEVER_NEGATIVE))
            or (name in ("add", "mul", "cat") and len(known) >= 2 and all(known))
        ):
            self.never_negative.update(map(id, node.outputs[:1]))

    def identity(self, output: Value, start: int, end: int) -> Identity | None:
        """Return what ``output`` equals without its branches, when operators ``start`` to ``end`` are residual.

        None when they are not: something else than a sum stands between the earlier value and the output, a
        branch cannot be made zero by parameters that only this stretch uses, or nothing is added that depends on
        the earlier value.
        """
        found = _Pass(self, start, end).run(output)
        if found is None or not found.branches or found.root.shape != output.shape:
            return None
        if found.order is not None:
            straight = torch.arange(found.order.numel()).view(found.order.shape)
            if not torch.equal(found.order, straight):
                return None
        return found if any(self._depends(branch, found.root, start) for branch in found.branches) else None

    def _depends(self, value: Value, root: Value, start: int) -> bool:
        """Whether ``value`` was computed from ``root``."""
        waiting, seen = [value], set()
        while waiting:
            own = waiting.pop()
            if own is root:
                return True
            if id(own) in seen or own.producer is None or self.produced.get(id(own), -1) < start:
                continue
            seen.add(id(own))
            waiting += own.producer.inputs()
        return False


class _Pass:
    """One pass over operators ``start`` to ``end``."""

    def __init__(self, stretches: Stretches, start: int, end: int) -> None:
        self.stretches = stretches
        self.start, self.end = start, end
        self.zero: dict[int, Zeroed] = {}
        self.same: dict[int, Identity] = {}
        self.base: dict[int, int] = {}
        self.views: set[int] = set()
        self.viewed: set[int] = set()
        self.stale: set[int] = set()
        self.number = start

    def run(self, output: Value) -> Identity | None:
        for number in range(self.start, self.end):
            self.number = number
            node = self.stretches.trace.nodes[number]
            if not node.outputs:
                continue
            name = node.name.removesuffix("_")
            self._aliases(node, name)
            zeroed = self._zero(node, name)
            if zeroed is not None:
                self.zero.update((id(value), zeroed) for value in node.outputs)
            if len(node.outputs) == 1:
                same = self._same(node, name)
                if same is not None:
                    self.same[id(node.output)] = same
        return self._identity_of(output)

    def _aliases(self, node: Node, name: str) -> None:
        """Keep track of views, and forget what is known of a tensor that is changed through one of them."""
        first = next(node.inputs(), None)
        if first is None:
            return
        base = self.base.get(id(first), id(first))
        if node.target._schema.is_mutable:
            if id(first) in self.views or base in self.viewed:
                self.stale.add(base)
            self.base.update((id(value), base) for value in node.outputs)
            self.views.update(id(value) for value in node.outputs if id(first) in self.views)
        elif name in _ALIASING:
            self.viewed.add(base)
            self.base.update((id(value), base) for value in node.outputs)
            self.views.update(map(id, node.outputs))

    def _is_stale(self, value: Value) -> bool:
        return self.base.get(id(value), id(value)) in self.stale

    def _zero_of(self, argument: object) -> Zeroed | None:
        """Parameters whose zeros make an argument zero; None where no parameters of this stretch do."""
        if argument is None or (isinstance(argument, int | float) and argument == 0):
            return frozenset()
        if isinstance(argument, list | tuple):
            every = [self._zero_of(item) for item in values_in(argument)]
            return _union(every) if every else None
        if not isinstance(argument, Value) or self._is_stale(argument):
            return None
        if argument.kind == "parameter":
            first, last = self.stretches.uses[id(argument)]
            return (
                frozenset({argument.name})
                if argument.is_floating and self.start <= first and last < self.end
                else None
            )
        return self.zero.get(id(argument))

    def _identity_of(self, value: Value) -> Identity | None:
        if self._is_stale(value):
            return None
        found = self.same.get(id(value))
        if found is not None:
            return found
        outside = self.stretches.produced.get(id(value), -1) < self.start
        return (
            Identity(value) if outside and value.kind in ("input", "result") and value.is_floating else None
        )

    def _zero(self, node: Node, name: str) -> Zeroed | None:
        arguments = node.args
        if name in _ZEROS:
            return frozenset()
        if name in _WRITES:
            places = _WRITES[name]
            return _union(
                [self._zero_of(arguments[place]) if place < len(arguments) else None for place in places]
            )
        if name == "einsum":
            return _fewest([self._zero_of(value) for value in values_in(arguments[1])])
        if name in _PRODUCTS:
            return _fewest(
                [self._zero_of(arguments[place]) for place in _PRODUCTS[name] if place < len(arguments)]
            )
        if name in _AFFINE:
            factors, bias = _AFFINE[name]
            product = _fewest(
                [self._zero_of(arguments[place]) for place in factors if place < len(arguments)]
            )
            shift = self._zero_of(arguments[bias]) if bias < len(arguments) else frozenset()
            return _union([product, shift])
        if name in _NORMS:
            return self._zero_norm(node)
        if name in _SAME_ORDER or name in _OTHER_ORDER or name in _ZERO_TO_ZERO:
            return self._zero_of(next(node.inputs(), None))
        if name in ("constant_pad_nd", "pad", "masked_fill"):
            filled = node.argument("value", 0)
            return self._zero_of(arguments[0]) if filled is None or filled == 0 else None
        if name == "pow" and isinstance(node.args[1], int | float) and node.args[1] > 0:
            return self._zero_of(arguments[0])
        return None

    def _zero_norm(self, node: Node) -> Zeroed | None:
        scale, shift = node.argument("weight"), node.argument("bias")
        if scale is not None:
            by_scale = _union([self._zero_of(scale), self._zero_of(shift)])
            if by_scale is not None:
                return by_scale
        if "batch" in node.name or "instance" in node.name:
            return None  # running means are taken off
        return _union([self._zero_of(node.args[0]), self._zero_of(shift)])

    def _same(self, node: Node, name: str) -> Identity | None:
        output = node.output
        if name in ("add", "sub"):
            return self._sum(node, name)
        first = next(node.inputs(), None)
        found = self._identity_of(first) if first is not None and first.is_floating else None
        if found is None or output.dtype != found.root.dtype:
            return None
        if name in ("dropout", "feature_dropout", "alpha_dropout"):
            return found if not node.argument("train") or node.argument("p") == 0 else None
        if name == "relu":
            return found if id(found.root) in self.stretches.never_negative else None
        if name in _SAME_ORDER:
            if math.prod(output.shape) != math.prod(found.root.shape):
                return None
            return found if found.order is None else replace(found, order=found.order.reshape(output.shape))
        if name in _OTHER_ORDER:
            order = found.order
            if order is None:
                order = torch.arange(math.prod(found.root.shape)).view(first.shape)  # type: ignore[union-attr]
            return replace(found, order=node.target(order, *node.args[1:], **node.kwargs))
        return None

    def _sum(self, node: Node, name: str) -> Identity | None:
        """``x + branch``, or ``branch + x``, where the branch can be made zero."""
        if len(node.args) < 2:
            return None
        first, second = node.args[:2]
        scaled = node.argument("alpha", 1) != 1
        for stays, branch, usable in (
            (first, second, True),
            (second, first, name == "add" and not scaled),
        ):
            if not usable or not isinstance(stays, Value) or not isinstance(branch, Value):
                continue
            found, zeroed = self._identity_of(stays), self._zero_of(branch)
            if found is None or zeroed is None:
                continue
            if node.output.shape != stays.shape or node.output.dtype != stays.dtype:
                continue
            return replace(
                found,
                zeroed=found.zeroed | zeroed,
                branches=(*found.branches, branch),
                sums=(*found.sums, self.number),
            )
        return None


def _union(every: list[Zeroed | None]) -> Zeroed | None:
    """All of them must be zero."""
    result: Zeroed = frozenset()
    for own in every:
        if own is None:
            return None
        result |= own
    return result


def _fewest(every: list[Zeroed | None]) -> Zeroed | None:
    """One of them must be zero."""
    known = [own for own in every if own is not None]
    return min(known, key=len) if known else None
