"""Which index of which leaf stands at each position of a tensor dimension."""

from __future__ import annotations

import torch

from dwindle.graph.axes import CONCATENATION, LEAF, Axis

Positions = dict[Axis, torch.Tensor]


def positions(axis: Axis, memory: dict[Axis, Positions] | None = None) -> Positions:
    """Return, for every leaf below ``axis``, the leaf's index at each position (int64; -1 where it has none).

    Args:
        axis: Any axis.
        memory: Results of earlier calls, by representative.
    """
    axis = axis.find()
    if memory is not None and axis in memory:
        return memory[axis]
    if axis.kind == LEAF:
        found = {axis: torch.arange(axis.size)}
    elif axis.kind == CONCATENATION:
        found = _concatenated(axis, memory)
    else:
        found = _multiplied(axis, memory)
    if memory is not None:
        memory[axis] = found
    return found


def _concatenated(axis: Axis, memory: dict[Axis, Positions] | None) -> Positions:
    found: Positions = {}
    start = 0
    for part in axis.parts:
        for leaf, index in positions(part, memory).items():
            if leaf not in found:
                found[leaf] = torch.full((axis.size,), -1)
            found[leaf][start : start + index.numel()] = index
        start += part.find().size
    return found


def _multiplied(axis: Axis, memory: dict[Axis, Positions] | None) -> Positions:
    found: Positions = {}
    sizes = [part.find().size for part in axis.parts]
    for place, part in enumerate(axis.parts):
        outer = 1
        for size in sizes[:place]:
            outer *= size
        inner = axis.size // (outer * sizes[place])
        for leaf, index in positions(part, memory).items():
            whole = index.view(1, -1, 1).expand(outer, -1, inner).reshape(-1)
            found[leaf] = torch.maximum(found[leaf], whole) if leaf in found else whole
    return found


def kept_positions(
    axis: Axis, keep: dict[Axis, torch.Tensor], memory: dict[Axis, Positions] | None = None
) -> torch.Tensor | None:
    """Return the positions of ``axis`` that stay (int64, ascending), or None when all stay.

    Args:
        axis: Any axis.
        keep: For each leaf that loses indices, a boolean tensor of its size.
        memory: As for :func:`positions`.
    """
    stay: torch.Tensor | None = None
    for leaf, index in positions(axis, memory).items():
        chosen = keep.get(leaf)
        if chosen is None:
            continue
        here = chosen[index.clamp_min(0)] | (index < 0)
        stay = here if stay is None else stay & here
    if stay is None or bool(stay.all()):
        return None
    return stay.nonzero().flatten()
