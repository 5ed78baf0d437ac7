"""Compares what a runtime computes with what torch computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """How far two lists of outputs are apart.

    Attributes:
        maximum: Largest absolute difference of any float entry.
        relative: Largest over the outputs of (largest difference / largest magnitude of that output).
        root_mean_square: Largest over the outputs of (root mean square of the difference / that of the
            output).
        mismatches: Fraction of unequal entries of integer and boolean outputs (largest over the outputs).
        problem: What makes the outputs incomparable (shapes, number of outputs, infinities), or None.
    """

    maximum: float
    relative: float
    root_mean_square: float
    mismatches: float
    problem: str | None = None


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Compare two lists of tensors.

    Infinities and NaN must stand in the same places; they take no further part.

    Args:
        expected: What torch gives.
        found: What the runtime gives.
    """
    if len(expected) != len(found):
        return Difference(0.0, 0.0, 0.0, 0.0, f"{len(found)} outputs instead of {len(expected)}")
    maximum = relative = root_mean_square = mismatches = 0.0
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if left.shape != right.shape:
            return Difference(
                0.0,
                0.0,
                0.0,
                0.0,
                f"output {index} has shape {tuple(right.shape)} instead of {tuple(left.shape)}",
            )
        if not left.numel():
            continue
        if not left.is_floating_point():
            mismatches = max(mismatches, (left.cpu() != right.cpu()).double().mean().item())
            continue
        left, right = left.detach().cpu().double(), right.detach().cpu().double()
        finite = left.isfinite()
        if not torch.equal(left[~finite].nan_to_num(nan=1.5), right[~finite].nan_to_num(nan=1.5)) or not bool(
            right[finite].isfinite().all()
        ):
            return Difference(
                0.0, 0.0, 0.0, 0.0, f"output {index} is not finite where torch's is, or the reverse"
            )
        left, right = left[finite], right[finite]
        if not left.numel():
            continue
        gap = (left - right).abs()
        maximum = max(maximum, gap.max().item())
        relative = max(relative, _ratio(gap.max().item(), left.abs().max().item()))
        root_mean_square = max(
            root_mean_square, _ratio(gap.square().mean().sqrt().item(), left.square().mean().sqrt().item())
        )
    return Difference(maximum, relative, root_mean_square, mismatches)


def _ratio(gap: float, scale: float) -> float:
    if gap == 0.0:
        return 0.0
    return gap / scale if scale > 0.0 else float("inf")
