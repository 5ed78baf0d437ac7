"""How well pictures are segmented: mean intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        predicted: Classes, int64, any shape.
        labels: True classes, the same shape.
        classes: How many there are.

    Returns:
        Shape ``(classes, classes)``, int64; rows are true classes.
    """
    pairs = labels.flatten() * classes + predicted.flatten()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_intersection_over_union(counts: Tensor) -> float:
    """Return the mean over the classes of ``right / (true + predicted - right)``, all pictures taken together.

    Classes that are neither there nor predicted do not count (Everingham et al., "The PASCAL Visual Object Classes
    Challenge", IJCV 2010, section 4.3).

    Args:
        counts: What :func:`confusion` gives, or the sum of several.
    """
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    return float((right[present] / union[present]).mean())
