"""Sets of channels that can only be scaled together: union-find over numbered units."""

from __future__ import annotations

import torch
from torch import Tensor


class Units:
    """Numbered units that can be united. Unit 0 stands for what must keep its scale."""

    def __init__(self) -> None:
        self._parents: list[int] = [0]

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int) -> Tensor:
        """Return the numbers of ``count`` new units, int64."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Make units one, element by element.

        Args:
            first: Numbers of units, int64.
            second: The same, broadcastable against the first.
        """
        left, right = torch.broadcast_tensors(first, second)
        pairs = torch.stack([left.reshape(-1), right.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]].unique(dim=1)
        for one, other in pairs.t().tolist():
            one, other = self._root(one), self._root(other)
            if one != other:
                self._parents[max(one, other)] = min(one, other)

    def roots(self, units: Tensor) -> Tensor:
        """Return for each unit the number of the set it is in, the smallest number of the set."""
        found, where = units.unique(return_inverse=True)
        roots = torch.tensor([self._root(unit) for unit in found.tolist()], dtype=torch.int64)
        return roots[where].reshape(units.shape)

    def frozen(self, units: Tensor) -> bool:
        """Whether all of these units must keep their scale."""
        return not bool(self.roots(units).any())

    def _root(self, unit: int) -> int:
        root = unit
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[unit] != root:
            self._parents[unit], unit = root, self._parents[unit]
        return root
