"""What a detector is trained on: where the middle of a face is, and how far its sides are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detection.model import REACH, STRIDES, places
from torch import Tensor
from torch.nn import functional

LIMIT = 22.0
"""Faces below this size, in pixels, belong to the fine level, the others to the coarse one."""

MIDDLE = 0.2
"""A place is in the middle of a face when it is nearer to its centre than this share of its size."""


def detection_loss(answers: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
    """Return the focal loss of the scores plus the overlap loss of the sides, a 0-d tensor.

    Lin et al., "Focal Loss for Dense Object Detection" (https://arxiv.org/abs/1708.02002); the overlap loss is
    ``1 - IoU`` of the told and the true box around one place (UnitBox, https://arxiv.org/abs/1608.01471).

    Args:
        answers: Of the detector.
        boxes: True boxes, shape ``(batch, faces, 4)``, NaN where there are fewer.
    """
    total, positives = torch.zeros(()), torch.zeros(())
    for level in STRIDES:
        scores, sides = answers[f"{level}_scores"], answers[f"{level}_sides"]
        wanted, true_sides, counts = targets(level, boxes, *scores.shape[-2:])
        focal = _focal(scores[:, 0], wanted) * counts
        middle = wanted > 0
        told = sides.clamp(min=0.01).movedim(1, -1)[middle]
        total = total + focal.sum() + (1 - _overlap(told, true_sides[middle])).sum()
        # Sides below zero must come back, which the clamp alone would not let them.
        total = total + functional.relu(0.01 - sides.movedim(1, -1)[middle]).sum()
        positives = positives + middle.sum()
    return total / positives.clamp(min=1)


def targets(level: str, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a level shall say.

    Returns:
        Wanted scores 0 or 1, shape ``(batch, height, width)``; true distances in units of the level, shape
        ``(batch, height, width, 4)``; and which places count: those within a face but not in its middle do not.
    """
    x, y = places(level, height, width)
    left, top, right, bottom = (side[..., None, None] for side in boxes.unbind(-1))
    distances = torch.stack([x - left, y - top, right - x, bottom - y], -1) / REACH[level]
    size = right - left
    away = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs()) / size
    belongs = (size < LIMIT) == (level == "fine")
    middle = (away < MIDDLE) & belongs  # NaN is nowhere
    # A face of the other level is no background here either: about its middle nothing is asked.
    near = ((away < 2 * MIDDLE) & ~middle).any(1)
    chosen = middle.int().argmax(1, keepdim=True)[..., None].expand(-1, -1, -1, -1, 4)
    wanted = middle.any(1)
    return wanted.float(), distances.gather(1, chosen)[:, 0], (wanted | ~near).float()


def _focal(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    surprise = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = 1 - torch.exp(-surprise)
    return torch.where(wanted > 0, alpha, 1 - alpha) * missed**gamma * surprise


def _overlap(told: Tensor, true: Tensor) -> Tensor:
    """Intersection over union of two boxes around one place, by their sides."""
    shared = torch.minimum(told, true)
    shared_area = (shared[:, 0] + shared[:, 2]) * (shared[:, 1] + shared[:, 3])
    areas = [(sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3]) for sides in (told, true)]
    return shared_area / (areas[0] + areas[1] - shared_area)
