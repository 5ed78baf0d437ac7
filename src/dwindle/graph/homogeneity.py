"""How a factor on some tensors travels through a recording.

Multiply a weight by a factor, and its product is multiplied by it as well; a sum is, where both summands are; a
softmax or a norm is not. The *degree* of a tensor element is the power of the factor in it. Following degrees
shows whether a changed temperature and a changed weight cancel before anything notices.

Degrees of a tensor are a tensor of the same rank, with size 1 along every dimension on which they do not depend.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dwindle.graph.nodes import Node, Value, values_in
from dwindle.graph.trace import Trace

#: Tensors larger than this are not followed position by position.
LARGEST = 50_000_000

#: Operators that move elements without changing them: the first tensor is what they move.
MOVEMENTS = frozenset(
    {"view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
     "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "expand",
     "expand_as", "broadcast_to", "repeat", "repeat_interleave", "split", "split_with_sizes", "chunk",
     "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "select", "slice", "narrow", "roll", "flip"}
)  # fmt: skip

#: Operators of one tensor that keep a positive factor, element by element.
UNARY = frozenset(
    {"alias", "clone", "contiguous", "detach", "dropout", "alpha_dropout", "feature_dropout", "to", "_to_copy", "neg",
     "relu", "leaky_relu", "abs", "lift", "lift_fresh", "lift_fresh_copy", "requires_grad_", "type_as", "resolve_conj",
     "resolve_neg"}
)  # fmt: skip

#: Operators of one tensor that keep a factor which is the same everywhere.
_UNIFORM = frozenset(
    {"sum", "mean", "amax", "amin", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
     "adaptive_avg_pool1d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "tril", "triu"}
)  # fmt: skip

_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")

Degrees = torch.Tensor
Get = Callable[[Value], Degrees]


class _NotHomogeneousError(Exception):
    """An operator would notice the factor."""


def base_name(node: Node) -> str:
    """Name of an operator without the underscore of its in-place form."""
    name = node.name
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def compressed(degrees: torch.Tensor) -> torch.Tensor:
    """Shrink every dimension along which all entries are equal to size 1."""
    for dim, size in enumerate(degrees.shape):
        if size > 1:
            first = degrees.narrow(dim, 0, 1)
            if bool((degrees == first).all()):
                degrees = first
    return degrees


def flat(degree: float, rank: int) -> Degrees:
    """Degrees of a tensor of ``rank`` dimensions that are ``degree`` everywhere."""
    return torch.full([1] * rank, float(degree))


def moved(node: Node, tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a movement makes of ``tensor``, which stands for its first input at full size."""
    data = next(node.inputs())
    if tensor.numel() > LARGEST:
        raise _NotHomogeneousError(node.name)

    def swap(argument: Any) -> Any:
        if argument is data:
            return tensor
        if isinstance(argument, Value):
            return torch.empty(argument.shape, device="meta")
        return argument

    result = node.target(*map(swap, node.args), **{key: swap(item) for key, item in node.kwargs.items()})
    return [result] if isinstance(result, torch.Tensor) else list(result)


class Followed:
    """Degrees of every tensor of one recording after some tensors got a factor.

    Args:
        trace: The recording.
        live: Its live nodes, in order.
        uses: For each value's identity the numbers of the live nodes that read it.
        start: Degrees of parameters, by name, and of results, by identity.
        sources: For each node's identity, the power with which its own factor changes: where such a node meets a
            factor that cancels it, the two are gone behind it.
    """

    def __init__(
        self,
        trace: Trace,
        live: list[Node],
        uses: Mapping[int, list[int]],
        start: Mapping[str | int, Degrees],
        sources: Mapping[int, float],
    ) -> None:
        self.sources = sources
        self.covered: set[int] = set()
        self.passed: list[Node] = []
        self.refused: Node | None = None
        self._degrees: dict[int, Degrees] = {}
        queue: list[int] = []
        for key, degrees in start.items():
            if isinstance(key, str) and key not in trace.parameters:
                continue
            identity = id(trace.parameters[key]) if isinstance(key, str) else key
            self._degrees[identity] = degrees
            queue += uses.get(identity, [])
        self._follow(live, uses, queue)
        kept = [value for value in [*trace.flat_outputs, *trace.outputs] if isinstance(value, Value)]
        if self.refused is None and any(self._is_touched(value) for value in kept):
            self.refused = live[-1]

    @property
    def vanishes(self) -> bool:
        """Whether the factor is gone before any operator, or the user, would notice it."""
        return self.refused is None

    def _follow(self, live: list[Node], uses: Mapping[int, list[int]], queue: list[int]) -> None:
        heapq.heapify(queue)
        done = -1
        while queue:
            number = heapq.heappop(queue)
            if number == done:
                continue
            done = number
            node = live[number]
            try:
                results = self._outputs(node)
            except Exception:
                # whatever an operator's call does not fit: it is not known to keep the factor
                self.refused = node
                return
            self.passed.append(node)
            for value, degrees in zip(node.outputs, results, strict=True):
                degrees = compressed(degrees)
                if bool((degrees != 0).any()):
                    self._degrees[id(value)] = degrees
                    for later in uses.get(id(value), []):
                        heapq.heappush(queue, later)

    def _get(self, value: Value) -> Degrees:
        found = self._degrees.get(id(value))
        return flat(0, len(value.shape)) if found is None else found

    def degree(self, value: Value) -> float:
        """Degree of a tensor that has the same one everywhere; 0 for any other."""
        found = self._get(value)
        return float(found) if found.numel() == 1 else 0.0

    def _is_touched(self, value: Value) -> bool:
        return id(value) in self._degrees

    def _outputs(self, node: Node) -> list[Degrees]:
        if not any(self._is_touched(value) for value in node.inputs()):
            return [flat(0, len(value.shape)) for value in node.outputs]
        name = base_name(node)
        if name in MOVEMENTS:
            return self._moved(node)
        rule = _RULES.get(name)
        if rule is None:
            raise _NotHomogeneousError(name)
        own = self.sources.get(id(node))
        if own is None:
            return rule(node, self._get, 0.0)
        try:
            results = rule(node, self._get, own)
            cancelled = all(bool((degrees == 0).all()) for degrees in results)
        except _NotHomogeneousError:
            cancelled = False
        if not cancelled:
            raise _NotHomogeneousError(name)
        self.covered.add(id(node))
        return results

    def _moved(self, node: Node) -> list[Degrees]:
        data = next(node.inputs())
        degrees = self._get(data)
        if degrees.numel() == 1:
            return [flat(float(degrees), len(value.shape)) for value in node.outputs]
        full = degrees.expand(data.shape).contiguous()
        return moved(node, full)


Rule = Callable[[Node, Get, float], list[Degrees]]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def decorate(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return decorate


def _same(first: Degrees, second: Degrees) -> Degrees:
    """Both where they agree everywhere."""
    if bool((first - second != 0).any()):
        raise _NotHomogeneousError
    return torch.broadcast_tensors(first, second)[0]


def _ranked(degrees: Degrees, rank: int) -> Degrees:
    return degrees.reshape([1] * (rank - degrees.dim()) + list(degrees.shape))


def _uniform(degrees: Degrees, dim: int) -> Degrees:
    """Degrees that do not depend on ``dim``."""
    if degrees.shape[dim] != 1:
        raise _NotHomogeneousError
    return degrees


def _numbers(node: Node) -> list[float]:
    return [float(item) for item in node.args if isinstance(item, int | float) and not isinstance(item, bool)]


@_rule(*UNARY)
def _unary(node: Node, get: Get, own: float) -> list[Degrees]:
    return [get(next(node.inputs())) for _ in node.outputs]


@_rule(*_UNIFORM)
def _reduced(node: Node, get: Get, own: float) -> list[Degrees]:
    degrees = get(next(node.inputs()))
    if degrees.numel() != 1:
        raise _NotHomogeneousError
    return [flat(float(degrees), len(value.shape)) for value in node.outputs]


@_rule("pad", "constant_pad_nd")
def _padded(node: Node, get: Get, own: float) -> list[Degrees]:
    if any(_numbers(node)):
        raise _NotHomogeneousError
    return _reduced(node, get, own)


@_rule(*_POWERS, "pow")
def _power(node: Node, get: Get, own: float) -> list[Degrees]:
    name = base_name(node)
    power = float(node.args[1]) if name == "pow" else _POWERS[name]
    return [power * get(next(node.inputs()))]


@_rule("mul", "multiply", "div", "divide", "true_divide")
def _multiplied(node: Node, get: Get, own: float) -> list[Degrees]:
    if node.argument("rounding_mode") is not None:
        raise _NotHomogeneousError
    rank = len(node.output.shape)
    total = flat(own, rank)
    for place, argument in enumerate(node.args[:2]):
        if isinstance(argument, Value):
            sign = -1 if place and base_name(node) not in ("mul", "multiply") else 1
            total = total + sign * get(argument)
    return [_ranked(total, rank)]


@_rule("add", "sub", "subtract", "where", "maximum", "minimum")
def _added(node: Node, get: Get, own: float) -> list[Degrees]:
    values = [v for argument in node.args for v in values_in(argument) if v.dtype is not torch.bool]
    if any(_numbers(node)[:1]):
        raise _NotHomogeneousError
    total = get(values[0])
    for value in values[1:]:
        total = _same(total, get(value))
    return [_ranked(total, len(node.output.shape))]


@_rule("masked_fill")
def _filled(node: Node, get: Get, own: float) -> list[Degrees]:
    data, filling = node.args[0], node.args[2]
    if isinstance(filling, Value) or not (filling == 0 or math.isinf(filling)):
        raise _NotHomogeneousError
    return [_ranked(get(data), len(node.output.shape))]


@_rule("cat", "concat", "concatenate", "stack")
def _joined(node: Node, get: Get, own: float) -> list[Degrees]:
    values = list(node.inputs())
    every = [get(value) for value in values]
    rank = len(node.output.shape)
    if all(degrees.numel() == 1 and float(degrees) == float(every[0]) for degrees in every):
        return [flat(float(every[0]), rank)]
    if sum(math.prod(value.shape) for value in values) > LARGEST:
        raise _NotHomogeneousError
    full = [degrees.expand(value.shape) for degrees, value in zip(every, values, strict=True)]
    dim = int(node.argument("dim", 0))
    return [torch.stack(full, dim) if base_name(node) == "stack" else torch.cat(full, dim)]


@_rule("matmul", "bmm", "mm")
def _product(node: Node, get: Get, own: float) -> list[Degrees]:
    first, second = node.args[:2]
    return [_ranked(_matrix_product(get(first), get(second), own), len(node.output.shape))]


def _matrix_product(first: Degrees, second: Degrees, own: float = 0.0) -> Degrees:
    if first.dim() < 2 or second.dim() < 2:
        raise _NotHomogeneousError
    return _uniform(first, -1) + _uniform(second, -2) + own


@_rule("addmm", "baddbmm")
def _added_product(node: Node, get: Get, own: float) -> list[Degrees]:
    added, first, second = list(node.inputs())[:3]
    result = _matrix_product(get(first), get(second), own)
    if node.argument("beta", 1) != 0:
        result = _same(result, get(added))
    return [_ranked(result, len(node.output.shape))]


@_rule("linear")
def _linear(node: Node, get: Get, own: float) -> list[Degrees]:
    data, weight, *bias = list(node.inputs())
    rows = _uniform(get(weight), 1)[:, 0]
    result = _uniform(get(data), -1) + rows
    if bias:
        result = _same(result, get(bias[0]))
    return [result]


@_rule(*_CONVOLUTIONS)
def _convolution(node: Node, get: Get, own: float) -> list[Degrees]:
    data, weight, *bias = list(node.inputs())
    degrees, kernel = get(data), get(weight)
    if degrees.numel() != 1 or any(size != 1 for size in kernel.shape[1:]):
        raise _NotHomogeneousError
    rows = kernel.flatten() + float(degrees)
    if bias:
        rows = _same(rows, get(bias[0]))
    rank = len(node.output.shape)
    return [rows.reshape([-1] + [1] * (kernel.dim() - 2)).reshape(
        [1] * (rank - kernel.dim() + 1) + [rows.numel()] + [1] * (kernel.dim() - 2)
    )]  # fmt: skip


@_rule("embedding")
def _embedding(node: Node, get: Get, own: float) -> list[Degrees]:
    weight = _uniform(get(node.args[0]), 0)
    return [_ranked(weight[0], len(node.output.shape))]


@_rule("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
def _normalized(node: Node, get: Get, own: float) -> list[Degrees]:
    data = next(node.inputs())
    if bool((get(data) != 0).any()):
        raise _NotHomogeneousError
    weight, bias = node.argument("weight"), node.argument("bias")
    total: Degrees | None = get(weight) if isinstance(weight, Value) else None
    if isinstance(bias, Value):
        total = _same(flat(0, 1) if total is None else total, get(bias))
    rank = len(node.output.shape)
    if total is None:
        return [flat(0, rank)]
    if base_name(node) in ("layer_norm", "rms_norm"):
        return [_ranked(total, rank)]
    return [total.reshape([1, -1] + [1] * (rank - 2))]


@_rule(*_ATTENTION)
def _attention(node: Node, get: Get, own: float) -> list[Degrees]:
    query, key, value = list(node.inputs())[:3]
    mask = node.argument("attn_mask")
    scores = [get(query), get(key)]
    if any(degrees.numel() != 1 for degrees in scores) or sum(map(float, scores)) + own != 0:
        raise _NotHomogeneousError
    if isinstance(mask, Value) and bool((get(mask) != 0).any()):
        raise _NotHomogeneousError
    degrees = get(value)
    if degrees.numel() != 1:
        raise _NotHomogeneousError
    return [flat(float(degrees), len(output.shape)) for output in node.outputs]


@_rule("einsum")
def _summed(node: Node, get: Get, own: float) -> list[Degrees]:
    every = [get(value) for argument in node.args[1:] for value in values_in(argument)]
    if any(degrees.numel() != 1 for degrees in every):
        raise _NotHomogeneousError
    return [flat(sum(map(float, every)) + own, len(node.output.shape))]


def uses_of(live: Iterable[Node]) -> dict[int, list[int]]:
    """For each value's identity, the numbers of the nodes that read it."""
    found: dict[int, list[int]] = {}
    for number, node in enumerate(live):
        for value in node.inputs():
            found.setdefault(id(value), []).append(number)
    return found
