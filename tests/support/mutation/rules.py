"""Deliberately wrong rules of operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dwindle.graph import axes as algebra
from dwindle.graph.axes import CONCATENATION, LEAF, Axis
from dwindle.graph.nodes import Node
from dwindle.graph.rules import elementwise, registry
from dwindle.graph.rules.registry import Scope

#: Counts how often a mutation changed anything.
Hits = list[str]
Mutation = Callable[[Hits], Any]

MUTATIONS: dict[str, Mutation] = {}

#: Which operators a mutation concerns; a mutation that is not in here concerns all models.
OPERATORS: dict[Mutation, tuple[str, ...]] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    """Register a context manager that puts a wrong rule in place; it appends to the list it is given when it acts."""

    def decorate(function: Mutation) -> Mutation:
        MUTATIONS[name] = function
        return function

    return decorate


@contextmanager
def replaced(
    names: Iterable[str], wrapper: Callable[[Callable[..., Any], Node, Scope], None]
) -> Iterator[None]:
    """Run ``wrapper(rule, node, scope)`` in place of the rules of some operators."""
    table = dict(registry._RULES)

    def wrap(rule: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(node: Node, scope: Scope) -> None:
            wrapper(rule, node, scope)

        return wrapped

    for name in names:
        table[name] = wrap(table.get(name) or table["<pointwise>"])
    with mock.patch.object(registry, "_RULES", table):
        yield


def concerning(apply: Mutation, *names: str) -> Mutation:
    """Note which operators a mutation changes the rules of."""
    OPERATORS[apply] = names
    return apply


def after(*names: str) -> Callable[[Callable[[Node, Scope], bool]], Callable[[Hits], Any]]:
    """A mutation that changes what a rule has left behind; the function says whether it changed anything."""

    def decorate(function: Callable[[Node, Scope], bool]) -> Callable[[Hits], Any]:
        def apply(hits: Hits) -> Any:
            def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
                rule(node, scope)
                if function(node, scope):
                    hits.append(node.name)

            return replaced(names, wrapper)

        return concerning(apply, *names)

    return decorate


def uncoupled(*names: str, place: int) -> Callable[[Hits], Any]:
    """The tensor argument at ``place`` is not related to the others: the rule sees new axes in its stead."""

    def apply(hits: Hits) -> Any:
        def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
            values = list(node.inputs())
            if len(values) <= place or all(axis.size == 1 for axis in values[place].axes):
                rule(node, scope)
                return
            value = values[place]
            own = value.axes
            value.axes = [algebra.leaf(axis.size) for axis in own]
            hits.append(node.name)
            try:
                rule(node, scope)
            finally:
                value.axes = own

        return replaced(names, wrapper)

    return concerning(apply, *names)


def fresh_result(*names: str) -> Callable[[Hits], Any]:
    """The result has new axes in place of its argument's."""

    @after(*names)
    def apply(node: Node, scope: Scope) -> bool:
        node.output.axes = [
            axis if axis.frozen or axis.kind != LEAF else algebra.leaf(axis.size)
            for axis in (axis.find() for axis in node.output.axes)
        ]
        return True

    return apply


def unmixed(*names: str) -> Callable[[Hits], Any]:
    """The rule does not say that the operator combines indices."""

    @after(*names)
    def apply(node: Node, scope: Scope) -> bool:
        before = len(scope.mixings)
        scope.mixings[:] = [mixing for mixing in scope.mixings if mixing.node is not node]
        return len(scope.mixings) < before

    return apply


def unfrozen(*names: str) -> Callable[[Hits], Any]:
    """The rule freezes nothing."""

    def apply(hits: Hits) -> Any:
        def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
            def nothing(*args: Any) -> None:
                hits.append(node.name)

            with (
                mock.patch.object(Scope, "freeze", nothing),
                mock.patch("dwindle.graph.rules.shape.single", nothing),
            ):
                rule(node, scope)

        return replaced(names, wrapper)

    return concerning(apply, *names)


def reversed_products(*names: str) -> Callable[[Hits], Any]:
    """The rule writes every product it makes with its factors in reverse."""

    def apply(hits: Hits) -> Any:
        def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
            original = algebra.product

            def reverse(parts: Any) -> Axis:
                parts = list(parts)
                if len([part for part in parts if part.size > 1]) > 1:
                    hits.append(node.name)
                return original(parts[::-1])

            module = sys.modules[getattr(rule, "__wrapped__", rule).__module__]
            with mock.patch.object(algebra, "product", reverse):
                if hasattr(module, "product"):
                    with mock.patch.object(module, "product", reverse):
                        rule(node, scope)
                else:
                    rule(node, scope)

        return replaced(names, wrapper)

    return concerning(apply, *names)


# dropped couplings

MUTATIONS["sum without coupling"] = uncoupled("add", "add_", "sub", place=1)
MUTATIONS["product without coupling"] = uncoupled("mul", place=1)
MUTATIONS["quotient without coupling"] = uncoupled("div", place=1)
MUTATIONS["norm on new channels"] = fresh_result("layer_norm", "group_norm", "batch_norm")
MUTATIONS["softmax on new channels"] = fresh_result("softmax")
MUTATIONS["activation on new channels"] = fresh_result("relu", "gelu", "silu", "tanh")
MUTATIONS["linear layer not coupled to its input"] = uncoupled("linear", place=0)
MUTATIONS["linear layer not coupled to its bias"] = uncoupled("linear", place=2)
MUTATIONS["convolution not coupled to its input"] = uncoupled("conv2d", place=0)
MUTATIONS["convolution not coupled to its bias"] = uncoupled("conv2d", place=2)
MUTATIONS["batch norm without its scale"] = uncoupled("batch_norm", place=1)
MUTATIONS["batch norm without its shift"] = uncoupled("batch_norm", place=2)
MUTATIONS["batch norm without its mean"] = uncoupled("batch_norm", place=3)
MUTATIONS["layer norm without its scale"] = uncoupled("layer_norm", place=1)
MUTATIONS["group norm without its shift"] = uncoupled("group_norm", place=2)
MUTATIONS["product of matrices without inner coupling"] = uncoupled("matmul", "bmm", place=1)
MUTATIONS["einsum without coupling"] = uncoupled("einsum", place=1)
MUTATIONS["bilinear without coupling"] = uncoupled("bilinear", place=0)
MUTATIONS["stack without coupling"] = uncoupled("stack", place=1)
MUTATIONS["embedding width lost"] = uncoupled("embedding", place=0)
MUTATIONS["prelu without its slopes"] = uncoupled("prelu", place=1)
MUTATIONS["recurrent layer not coupled to its input"] = uncoupled("lstm", "gru", "rnn_tanh", place=0)
MUTATIONS["attention: keys lost"] = uncoupled("scaled_dot_product_attention", place=1)
MUTATIONS["attention: values lost"] = uncoupled("scaled_dot_product_attention", place=2)
MUTATIONS["concatenation: first part lost"] = uncoupled("cat", place=0)

# products in the wrong order

MUTATIONS["grouped convolution: inner before group"] = reversed_products("conv2d")
MUTATIONS["grouped transposed convolution: inner before group"] = reversed_products("conv_transpose2d")
MUTATIONS["group norm: inner before group"] = reversed_products("group_norm")
MUTATIONS["repeat: copies are the inner factor"] = reversed_products("repeat")
MUTATIONS["repeat_interleave: copies are the outer factor"] = reversed_products("repeat_interleave")
MUTATIONS["grouped queries: copies are the outer factor"] = reversed_products("scaled_dot_product_attention")
MUTATIONS["pixel shuffle: space before channels"] = reversed_products("pixel_shuffle")
MUTATIONS["pixel unshuffle: space before channels"] = reversed_products("pixel_unshuffle")
MUTATIONS["channel shuffle without the shuffle"] = reversed_products("channel_shuffle")
MUTATIONS["unfold: kernel before channels"] = reversed_products("im2col")
MUTATIONS["recurrent gates: hidden before gate"] = reversed_products("lstm", "gru", "rnn_tanh")

# operators that combine indices, not said

MUTATIONS["layer norm does not mix"] = unmixed("layer_norm")
MUTATIONS["group norm does not mix"] = unmixed("group_norm")
MUTATIONS["softmax does not mix"] = unmixed("softmax")
MUTATIONS["mean does not mix"] = unmixed("mean")
MUTATIONS["maximum does not mix"] = unmixed("amax")
MUTATIONS["deviation does not mix"] = unmixed("std")
MUTATIONS["sum of exponentials does not mix"] = unmixed("logsumexp")
MUTATIONS["weight norm does not mix"] = unmixed("_weight_norm", "_weight_norm_interface")
MUTATIONS["product of matrices does not mix"] = unmixed("matmul", "bmm")

# positions that count, not frozen

MUTATIONS["embedding rows may go"] = unfrozen("embedding")
MUTATIONS["looked up numbers may go"] = unfrozen("index")
MUTATIONS["rolled indices may go"] = unfrozen("roll")
MUTATIONS["summed up indices may go"] = unfrozen("cumsum")
MUTATIONS["sorted indices may go"] = unfrozen("sort")
MUTATIONS["flipped indices may go"] = unfrozen("flip")
MUTATIONS["a selected index may go"] = unfrozen("select")


# segments and results in the wrong place


def _swap(items: list[Any], first: int, second: int) -> None:
    items[first], items[second] = items[second], items[first]


@mutation("concatenation: parts swapped")
@after("cat")
def concatenation_swapped(node: Node, scope: Scope) -> bool:
    values = [value for value in node.inputs() if value.shape != (0,)]
    dim = int(node.argument("dim", 0)) % len(values[0].shape)
    parts = [value.axes[dim] for value in values]
    node.output.axes[dim] = algebra.concatenation([*parts[1:], parts[0]])
    return True


@mutation("parts of a split swapped")
@after("split", "split_with_sizes", "chunk")
def split_swapped(node: Node, scope: Scope) -> bool:
    first, second = node.outputs[0], node.outputs[-1]
    if first.shape != second.shape:
        return False
    first.axes, second.axes = second.axes, first.axes
    return True


@mutation("slices swapped")
@after("slice")
def slice_swapped(node: Node, scope: Scope) -> bool:
    data = next(node.inputs())
    dim = int(node.argument("dim", 0)) % len(data.shape)
    whole, own = data.axes[dim].find(), node.output.axes[dim].find()
    others = [part.find() for part in whole.parts if part.find() is not own and part.find().size == own.size]
    if whole.kind != CONCATENATION or not others:
        return False
    node.output.axes = [others[0] if place == dim else axis for place, axis in enumerate(node.output.axes)]
    return True


def glu_apart(hits: Hits) -> Any:
    def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
        data = next(node.inputs())
        dim = int(node.argument("dim")) % len(data.axes)
        half = data.shape[dim] // 2
        first, _ = algebra.split(data.axes[dim], [half, half], scope.where)
        node.output.axes = [first if place == dim else axis for place, axis in enumerate(data.axes)]
        hits.append(node.name)

    return replaced(["glu"], wrapper)


MUTATIONS["halves of glu not coupled"] = concerning(glu_apart, "glu")


@mutation("transposed result: axes stay in place")
@after("transpose", "permute")
def transpose_ignored(node: Node, scope: Scope) -> bool:
    data = next(node.inputs())
    if data.shape != node.output.shape:
        return False
    node.output.axes = list(data.axes)
    return True


@mutation("product of matrices: result transposed")
@after("matmul", "bmm")
def matmul_transposed(node: Node, scope: Scope) -> bool:
    axes = list(node.output.axes)
    if len(axes) < 2 or axes[-1].size != axes[-2].size:
        return False
    _swap(axes, -1, -2)
    node.output.axes = axes
    return True


def _reversed_view(hits: Hits) -> Any:
    """A dimension that is cut in factors: the factors stand in reverse."""

    def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
        data = next(node.inputs())
        before = [axis.find() for axis in data.axes]
        rule(node, scope)
        after_ = [axis.find() for axis in node.output.axes]
        new = [axis for axis in after_ if axis not in before and axis.size > 1]
        if len(after_) > len(before) and len(new) == 2 and all(axis.kind == LEAF for axis in new):
            places = [place for place, axis in enumerate(after_) if axis in new]
            if new[0].size == new[1].size:
                _swap(node.output.axes, *places)
                hits.append(node.name)

    return replaced(["view", "reshape", "unflatten"], wrapper)


MUTATIONS["view: factors swapped"] = concerning(_reversed_view, "view", "reshape", "unflatten")


def _reversed_flatten(hits: Hits) -> Any:
    """Dimensions that are merged: the product is written in reverse."""

    def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
        rule(node, scope)
        data = next(node.inputs())
        if len(node.output.axes) >= len(data.axes):
            return
        for place, axis in enumerate(node.output.axes):
            parts = algebra.factors(axis)
            if axis.find().kind == "product" and len(parts) == 2 and parts[0].size == parts[1].size:
                node.output.axes[place] = algebra.product(parts[::-1])
                hits.append(node.name)

    return replaced(["flatten", "reshape", "view"], wrapper)


MUTATIONS["flatten: factors swapped"] = concerning(_reversed_flatten, "flatten", "reshape", "view")


@mutation("softmax over the wrong dimension")
@after("softmax")
def softmax_elsewhere(node: Node, scope: Scope) -> bool:
    for mixing in scope.mixings:
        if mixing.node is node:
            mixing.axes = [
                axis for axis in next(node.inputs()).axes if axis not in mixing.axes and axis.size > 1
            ]
            return True
    return False


@mutation("grouped convolution taken for a plain one")
@after("conv2d")
def groups_ignored(node: Node, scope: Scope) -> bool:
    data = next(node.inputs())
    if int(node.argument("groups", 1)) == 1 or data.shape[1] != node.output.shape[1]:
        return False
    node.output.axes = [node.output.axes[0], algebra.leaf(node.output.shape[1]), *node.output.axes[2:]]
    return True


def _directions(hits: Hits) -> Any:
    """Both directions of a recurrent layer are taken to stand index by index, not one after the other."""

    def wrapper(rule: Callable[..., Any], node: Node, scope: Scope) -> None:
        rule(node, scope)
        axis = node.output.axes[-1].find()
        if axis.kind == CONCATENATION and len(axis.parts) == 2:
            node.output.axes[-1] = algebra.product([axis.parts[0], algebra.leaf(2)])
            hits.append(node.name)

    return replaced(["lstm", "gru", "rnn_tanh"], wrapper)


MUTATIONS["recurrent directions interleaved"] = concerning(_directions, "lstm", "gru", "rnn_tanh")

__all__ = ["MUTATIONS", "Hits", "Mutation", "elementwise", "mutation"]
