"""Random gates between 0 and 1 that are often exactly 0 or 1, and can be differentiated: hard concrete variables.

Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization"
(https://arxiv.org/abs/1712.01312); equation numbers are those of the paper.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BETA",
    "GAMMA",
    "ZETA",
    "expected_gate",
    "first_log_alpha",
    "hard_concrete",
    "logistic_noise",
    "median_when_open",
    "open_probability",
]

#: The paper's temperature, and the ends of the stretched interval (section 4.1 and appendix).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

#: Uniform numbers stay this far from 0 and 1, so that their logits stay finite.
_MARGIN = 1e-6


def hard_concrete(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return a sample of the gates (equations 10 and 11): a stretched concrete variable, cut off at 0 and 1.

    Args:
        log_alpha: Locations, any shape.
        noise: ``log(u) - log(1 - u)`` with ``u`` uniform between 0 and 1, same shape.

    Returns:
        Gates between 0 and 1, both ends included; same shape.
    """
    concrete = torch.sigmoid((noise + log_alpha) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def expected_gate(log_alpha: Tensor) -> Tensor:
    """Return the gates of evaluation (equation 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return the probability that a gate is not zero (equation 12); its sum is the expected L0 norm."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def median_when_open(log_alpha: Tensor) -> Tensor:
    """Return the median of those samples of a gate that are not zero: what an unlikely gate is worth when it stays."""
    quantile = 1 - open_probability(log_alpha) / 2
    return hard_concrete(log_alpha, torch.logit(quantile, eps=_MARGIN))


def first_log_alpha(closed: float) -> float:
    """Return the location at which a gate is zero with this probability."""
    return math.log((1 - closed) / closed) + BETA * math.log(-GAMMA / ZETA)


def logistic_noise(
    shape: Sequence[int], seed: int, step: int, name: str, device: torch.device | None = None
) -> Tensor:
    """Return ``log(u) - log(1 - u)`` with ``u`` uniform between 0 and 1: the noise of a Bernoulli's logit.

    Args:
        shape: Of the result.
        seed: Same seed, step and name give the same numbers (on one kind of device).
        step: Number of the optimizer step.
        name: What the noise is for.
        device: Where it is made.

    Returns:
        A float32 tensor.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest) >> 1)
    uniform = torch.rand(tuple(shape), generator=generator, device=device)
    return torch.logit(uniform, eps=_MARGIN)
