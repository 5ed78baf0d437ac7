"""Ranges of weights."""

from __future__ import annotations

from torch import Tensor


def weight_range(weight: Tensor, axis: int | None) -> Tensor:
    """Return the largest magnitude, per index of a dimension or of the whole weight.

    Args:
        weight: Any floating tensor.
        axis: Dimension with a range per index; None for one range.

    Returns:
        A vector of the size of ``axis``, or of one element.
    """
    if axis is None:
        return weight.abs().amax().reshape(1)
    others = [dim for dim in range(weight.dim()) if dim != axis]
    return weight.abs().amax(dim=others) if others else weight.abs()
