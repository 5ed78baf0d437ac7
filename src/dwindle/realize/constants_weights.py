"""Operators with weights that :mod:`dwindle.realize.constants` does not fold into: which indices may go there.

Transposed convolutions, matrix products with a parameter, einsum, bilinear and recurrent layers: an index that they
sum over may go when the data or the weight is zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.opaque import OpaqueTarget
from dwindle.graph.positions import positions
from dwindle.graph.rules.recurrent import RecurrentCall

RECURRENT = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
CONTRACTIONS = (
    frozenset(
        {"matmul", "mm", "bmm", "mv", "dot", "baddbmm", "addbmm", "addmv", "einsum", "bilinear", "tensordot"}
    )
    | RECURRENT
    | TRANSPOSED
)
_ZEROS = ("zeros", "new_zeros", "zeros_like")

#: Gives the effective value of a parameter or buffer of the recording, None for other values.
Weights = Callable[[Value], torch.Tensor | None]


def weights_from(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Return a lookup of effective parameters by the recording's value."""
    return lambda value: tensors.get(value.name) if value.kind in ("parameter", "buffer") else None


def _zero_at(axes: list[Axis], zero: torch.Tensor, leaf: Axis) -> torch.Tensor:
    """Whether everything at each index of ``leaf`` is zero; ``zero`` has one element a position."""
    result = torch.ones(leaf.size, dtype=torch.bool)
    for dim, axis in enumerate(axes):
        index = positions(axis).get(leaf)
        if index is None:
            continue
        others = [place for place in range(zero.dim()) if place != dim]
        here = zero.expand([axis.size if place == dim else -1 for place in range(zero.dim())])
        along = here.amin(others) if others else here
        bad = index[~along.to(torch.bool)]
        result[bad[bad >= 0]] = False
    return result


def summed_away(
    node: Node, free: set[Axis], weight: Weights, constant: Callable[[Value], torch.Tensor]
) -> dict[Axis, torch.Tensor]:
    """Return, for each leaf that the call sums over, which of its indices may go."""
    kept = {leaf for value in node.outputs for axis in value.axes for leaf in axis.leaves()}
    opaque = isinstance(node.target, OpaqueTarget)
    values = [value for value in node.inputs() if value.is_floating and value.axes]
    gone = {leaf for value in values for axis in value.axes for leaf in axis.leaves() if leaf in free} - kept
    allowed: dict[Axis, torch.Tensor] = {leaf: torch.full((leaf.size,), opaque) for leaf in gone}
    dead: dict[Axis, torch.Tensor] = {}
    for value in values:
        own = weight(value)
        zero = constant(value) == 0 if own is None else own.detach().cpu() == 0
        for leaf in gone & {leaf for axis in value.axes for leaf in axis.leaves()}:
            here = _zero_at(value.axes, zero, leaf)
            if opaque:
                allowed[leaf] &= (
                    here  # what it does with its tensors is not known: all of them are zero there
                )
            elif own is not None and node.name in RECURRENT:
                dead[leaf] = dead.get(leaf, torch.ones_like(here)) & here  # both directions read it
            else:
                allowed[leaf] |= here
    for leaf, unread in dead.items():
        allowed[leaf] |= unread
    return allowed


def recurrent_zeros(
    node: Node, weight: Weights, constant: Callable[[Value], torch.Tensor]
) -> dict[Axis, tuple[torch.Tensor, torch.Tensor]]:
    """Return, for the hidden and the projected axis of a recurrent call, which indices are always zero and may go.

    An index is always zero when its rows (all gates, all layers) and its initial states are zero. It may go then,
    or when nothing in the layer reads it. Where a weight is not known, none is zero and none may go.
    """
    call = RecurrentCall.of(node)
    found: dict[Axis, tuple[torch.Tensor, torch.Tensor]] = {}
    for leaf in dict.fromkeys(leaf for value in node.outputs for leaf in value.axes[-1].leaves()):
        zero_rows = torch.ones(leaf.size, dtype=torch.bool)
        unread = torch.ones(leaf.size, dtype=torch.bool)
        for value in [value for cell in call.cells for value in cell]:
            own = weight(value)
            if own is None:
                zero_rows[:] = unread[:] = False
                break
            zero = own.detach().cpu() == 0
            zero_rows &= _zero_at(value.axes[:1], zero if zero.dim() == 1 else zero.all(1), leaf)
            if zero.dim() == 2:
                unread &= _zero_at(value.axes[1:], zero.all(0), leaf)
        for state in call.states:
            if state.producer is None or state.producer.name not in _ZEROS:
                zero_rows &= _zero_at(state.axes, constant(state) == 0, leaf)
        found[leaf] = (zero_rows, zero_rows | unread)
    return found


def transposed_outputs(node: Node, weight: Weights) -> torch.Tensor | None:
    """Constants of the output channels of a transposed convolution: the bias where all weights are zero."""
    values = list(node.inputs())
    own = weight(values[1])
    if own is None:
        return None
    groups = int(node.argument("groups", 1) or 1)
    dead = (own.detach().cpu() == 0).flatten(2).all(2).view(groups, -1, own.shape[1]).all(1).flatten()
    shift = torch.zeros(dead.numel(), dtype=torch.float64)
    if len(values) > 2:
        bias = weight(values[2])
        if bias is None:
            return None
        shift = bias.detach().double().cpu()
    return torch.where(dead, shift, torch.full_like(shift, float("nan")))
