"""Learned rounding: whether each weight goes down or up to its next level is a variable (AdaRound).

``W~ = scale * clamp(floor(W / scale) + h(V), lowest, highest)`` with the rectified sigmoid
``h(V) = clamp(sigmoid(V) * 1.2 - 0.1, 0, 1)``; a regularizer ``sum(1 - |2 h - 1|^beta)``, whose beta falls from 20
to 2, drives every h to 0 or 1 (Nagel et al. 2020, arXiv 2004.10568, equations 21 to 25). Pure functions of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched beyond 1 and 0, so that h reaches both ends."""


def rectified_sigmoid(variables: Tensor) -> Tensor:
    """Return how far each weight is rounded up, from 0 (down) to 1 (up).

    Args:
        variables: Any shape.
    """
    return (torch.sigmoid(variables) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_variables(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the variables at which the soft weight is the float weight itself.

    Args:
        weight: Any shape.
        scale: Broadcastable to it.
    """
    ratio = weight / scale
    rest = ratio - ratio.floor()
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def soft_weight(floor: Tensor, variables: Tensor, scale: Tensor, form: NumberFormat) -> Tensor:
    """Return the weight that is rounded as far as the variables say.

    Args:
        floor: ``floor(weight / scale)``.
        variables: The same shape.
        scale: Broadcastable to it.
        form: The levels, signed and symmetric.
    """
    return (floor + rectified_sigmoid(variables)).clamp(form.lowest, form.highest) * scale


def hard_weight(floor: Tensor, variables: Tensor, scale: Tensor, form: NumberFormat) -> Tensor:
    """Return the weight on its levels: up where ``h`` is at least one half. Arguments as :func:`soft_weight`."""
    up = (rectified_sigmoid(variables) >= 0.5).to(floor.dtype)
    return (floor + up).clamp(form.lowest, form.highest) * scale


def rounding_regularizer(variables: Tensor, beta: float) -> Tensor:
    """Return how undecided the rounding is, a 0-d tensor: ``sum(1 - |2 h(V) - 1|^beta)``.

    Args:
        variables: Any shape.
        beta: Large values leave freedom in the middle, small ones pull towards the ends.
    """
    return (1 - (2 * rectified_sigmoid(variables) - 1).abs() ** beta).sum()


def annealed_beta(step: int, steps: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """Return beta at a step: ``start`` at the end of the warm-up, falling in a line to ``end``.

    Args:
        step: From 0.
        steps: How many there are.
        warmup: Share of the steps without regularizer.
        start: First beta.
        end: Last beta.
    """
    begin = warmup * steps
    share = max(0.0, min(1.0, (step - begin) / max(steps - begin, 1e-9)))
    return start + (end - start) * share
