"""Which index of which leaf stands at each position of a tensor dimension."""

from __future__ import annotations

import torch

from dwindle.graph.axes import CONCATENATION, INTERLEAVED, LEAF, PARALLEL, Axis

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
    elif axis.kind == INTERLEAVED:
        found = _taking_turns(axis, memory)
    elif axis.kind == PARALLEL:
        found = {}  # one position stands for several indices; nothing needs to know which
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


def _taking_turns(axis: Axis, memory: dict[Axis, Positions] | None) -> Positions:
    found: Positions = {}
    start, count = sum(piece.find().size for piece in axis.before), len(axis.parts)
    for number, part in enumerate(axis.parts):
        own = torch.arange(axis.size)[(number - start) % count :: count]
        for leaf, index in positions(part, memory).items():
            whole = found.setdefault(leaf, torch.full((axis.size,), -1))
            whole[own] = index
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
    """Return the positions of ``axis`` that stay (int64), or None when all stay.

    They stand in the order that the small axis has: ascending, but for a shuffle of parts that kept other indices.

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
    return _Order(keep).of(axis) if _is_shuffled(axis) else stay.nonzero().flatten()


def _is_shuffled(axis: Axis) -> bool:
    axis = axis.find()
    return axis.kind == INTERLEAVED or any(_is_shuffled(part) for part in axis.parts)


class _Order:
    """Positions of full axes that stay, in the order of the small axes.

    Args:
        keep: For each leaf that loses indices, a boolean tensor of its size.
    """

    def __init__(self, keep: dict[Axis, torch.Tensor]) -> None:
        self.keep = keep
        self.known: dict[Axis, torch.Tensor] = {}

    def of(self, axis: Axis) -> torch.Tensor:
        """Positions of one axis."""
        axis = axis.find()
        if axis not in self.known:
            self.known[axis] = self._of(axis)
        return self.known[axis]

    def _of(self, axis: Axis) -> torch.Tensor:
        if axis.kind == LEAF:
            chosen = self.keep.get(axis)
            return torch.arange(axis.size) if chosen is None else chosen.nonzero().flatten()
        parts = [self.of(part) for part in axis.parts]
        if axis.kind == INTERLEAVED:
            return self._taking_turns(axis, parts)
        sizes = [part.find().size for part in axis.parts]
        if axis.kind == CONCATENATION:
            return torch.cat([own + sum(sizes[:number]) for number, own in enumerate(parts)])
        result = torch.zeros(1, dtype=torch.int64)
        for own, size in zip(parts, sizes, strict=True):
            result = (result[:, None] * size + own[None, :]).flatten()
        return result

    def _taking_turns(self, axis: Axis, parts: list[torch.Tensor]) -> torch.Tensor:
        """Take one of the kept indices of each part in turn, beginning with the part whose turn it is."""
        count = len(parts)
        full = sum(piece.find().size for piece in axis.before)
        small = sum(self.of(piece).numel() for piece in axis.before)
        places = [
            torch.arange(axis.size)[(number - full) % count :: count][own] for number, own in enumerate(parts)
        ]
        result = torch.empty(sum(own.numel() for own in parts), dtype=torch.int64)
        for number, own in enumerate(places):
            mine = torch.arange(result.numel())[(number - small) % count :: count]
            if mine.numel() != own.numel():
                return torch.cat(places).sort().values  # counts that no small model could have
            result[mine] = own
        return result
