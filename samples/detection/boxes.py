"""From a detector's answers to boxes, and how good these are: overlap, suppression, average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detection.model import REACH, STRIDES, places
from torch import Tensor

Found = tuple[Tensor, Tensor]
"""Boxes of one picture, shape ``(n, 4)``, and their scores, shape ``(n,)``."""


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return intersection over union of every box with every other, shape ``(n, m)``.

    Args:
        first: Shape ``(n, 4)``: left, top, right, bottom.
        second: Shape ``(m, 4)``.
    """
    corners = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = (corners - torch.maximum(first[:, None, :2], second[None, :, :2])).clamp(min=0)
    shared = sides.prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-9)


def suppress(boxes: Tensor, scores: Tensor, threshold: float = 0.4) -> Tensor:
    """Return the indices of boxes that stay, best first: no two of them overlap by more than ``threshold``."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = overlap(boxes[order], boxes[order])
    alive = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if alive[index]:
            alive[index + 1 :] &= overlaps[index, index + 1 :] <= threshold
    return order[alive]


def detections(answers: Mapping[str, Tensor], candidates: int = 50, least_score: float = 0.02) -> list[Found]:
    """Turn the answers of a detector into boxes with scores, for each picture, best first."""
    all_boxes, all_scores = [], []
    for level in STRIDES:
        scores, sides = answers[f"{level}_scores"], answers[f"{level}_sides"]
        centres = places(level, *scores.shape[-2:])
        reach = sides.clamp(min=0) * REACH[level]
        boxes = torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], 1)
        all_boxes.append(boxes.flatten(2).transpose(1, 2))
        all_scores.append(scores.flatten(1).sigmoid())
    boxes, scores = torch.cat(all_boxes, 1), torch.cat(all_scores, 1)
    found = []
    for own_boxes, own_scores in zip(boxes, scores, strict=True):
        best, chosen = own_scores.topk(min(candidates, len(own_scores)))
        chosen = chosen[best > least_score]
        kept = chosen[suppress(own_boxes[chosen], own_scores[chosen])]
        found.append((own_boxes[kept], own_scores[kept]))
    return found


def average_precision(found: Sequence[Found], truth: Sequence[Tensor], threshold: float = 0.5) -> float:
    """Return the average precision of detections: the area under precision over recall.

    Detections of all pictures are taken best first. One is right when the true box that it overlaps most is
    overlapped by ``threshold`` at least and was not found before (Everingham et al., "The PASCAL Visual Object
    Classes Challenge", IJCV 2010, section 4.2). Precision at a recall is the best one at that recall or above, and the
    area is exact: the sum over all detections, as VOC has it since 2010.

    Args:
        found: Boxes and scores of each picture.
        truth: True boxes of each picture, shape ``(n, 4)``; rows with NaN are none.
        threshold: Smallest overlap (intersection over union) of a right detection.

    Returns:
        Between 0 and 1; NaN when there is no true box.
    """
    true_boxes = [boxes[~boxes.isnan().any(-1)] for boxes in truth]
    total = sum(len(boxes) for boxes in true_boxes)
    if total == 0:
        return float("nan")
    ranked = sorted(
        (
            (float(score), picture, box)
            for picture, own in enumerate(found)
            for box, score in zip(*own, strict=True)
        ),
        key=lambda entry: -entry[0],
    )
    taken = [torch.zeros(len(boxes), dtype=torch.bool) for boxes in true_boxes]
    right = torch.zeros(len(ranked), dtype=torch.float64)
    for rank, (_, picture, box) in enumerate(ranked):
        if len(true_boxes[picture]):
            best, index = overlap(box[None], true_boxes[picture])[0].max(0)
            if best >= threshold and not taken[picture][index]:
                taken[picture][index] = True
                right[rank] = 1
    precision = right.cumsum(0) / torch.arange(1, len(ranked) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float((best_from_here * right).sum() / total)


def equal_boxes(first: Sequence[Found], second: Sequence[Found], least_score: float = 0.2) -> float:
    """Return the share of boxes that two models, or a model and its file, both find: overlap 0.9, scores 0.05 apart.

    Args:
        first: Boxes and scores of each picture.
        second: Of the same pictures.
        least_score: Boxes below it in their own list are not asked for; their partners may be.
    """
    found = asked = 0
    for one, other in ((first, second), (second, first)):
        for (boxes, scores), (other_boxes, other_scores) in zip(one, other, strict=True):
            sure = scores >= least_score
            near = (scores[sure, None] - other_scores[None]).abs() <= 0.05
            asked += int(sure.sum())
            found += int((near & (overlap(boxes[sure], other_boxes) >= 0.9)).any(1).sum())
    return found / asked if asked else 1.0
