"""What is known of a loss's curvature without its Hessian: products with random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["hutchinson"]


def hutchinson(loss: Tensor, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor | None]:
    """Return one random estimate of the Hessian's diagonal, ``z * (H z)`` with signs ``z`` (Bekas et al. 2007).

    Its expectation is the diagonal exactly; ``H`` is that of all the weights together.

    Args:
        loss: A 0-d tensor whose graph is kept.
        weights: What the Hessian is of.
        generator: A CPU generator of the signs.

    Returns:
        One estimate for each weight; None where the loss does not depend on it, or only linearly.
    """
    first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    curved = [own is not None and own.requires_grad for own in first]
    signs = [
        (torch.randint(0, 2, own.shape, generator=generator) * 2 - 1).to(own.device, own.dtype)
        for own in weights
    ]
    outputs = [own for own, used in zip(first, curved, strict=True) if used and own is not None]
    directions = [own for own, used in zip(signs, curved, strict=True) if used]
    if not outputs:
        return [None] * len(weights)
    second = torch.autograd.grad(outputs, weights, directions, retain_graph=True, allow_unused=True)
    return [None if own is None else own * sign for own, sign in zip(second, signs, strict=True)]
