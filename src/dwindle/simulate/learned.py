"""Simulators with parameters of their own: masks whose scores are trained, and trained gates.

Their parameters stand in the model under the reserved name, so they move, are saved and are loaded with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.granularity import Granularity
from dwindle.simulate.simulators import MaskSimulator

__all__ = ["Gate", "ScoredMask", "straight_through"]


class _StraightThrough(torch.autograd.Function):
    """A product with a mask, whose gradient goes to the mask's score as if the mask were the score."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, score: Tensor, mask: Tensor, granularity: Granularity) -> Tensor:
        """Return ``tensor * mask``."""
        ctx.save_for_backward(tensor, mask)
        ctx.granularity, ctx.score_dtype = granularity, score.dtype
        return tensor * mask.to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of the tensor (masked) and of the score (summed over each block)."""
        (gradient,) = gradients
        tensor, mask = ctx.saved_tensors
        to_tensor = gradient * mask.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        to_score = None
        if ctx.needs_input_grad[1]:
            to_score = ctx.granularity.reduce((gradient * tensor).to(ctx.score_dtype), "sum")
        return to_tensor, to_score, None, None


def straight_through(tensor: Tensor, score: Tensor, mask: Tensor, granularity: Granularity) -> Tensor:
    """Return ``tensor * mask``; backwards the mask counts as the score itself.

    Args:
        tensor: A parameter of any shape.
        score: One value for each block, of ``granularity.block_shape(tensor.shape)``; gets
            the sum of ``gradient * tensor`` over each block.
        mask: 0 and 1, any shape that broadcasts to the tensor.
        granularity: The blocks.
    """
    result: Tensor = _StraightThrough.apply(tensor, score, mask, granularity)
    return result


class ScoredMask(MaskSimulator):
    """A mask that is made from trained scores.

    ``value`` is the mask that acts; whoever owns the simulator renews it from the scores.

    Attributes:
        score: One trained value for each block.
        granularity: The blocks.
        frozen: Whether the scores have no part in it any more; their gradient is zero then.
    """

    def __init__(self, score: Tensor, granularity: Granularity) -> None:
        super().__init__(torch.ones((), dtype=score.dtype, device=score.device))
        self.score = nn.Parameter(score)
        self.granularity = granularity
        self.frozen = False

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the masked tensor, of the same shape and dtype."""
        # Frozen scores get a gradient of zero, not none: data parallel training waits for every parameter.
        score = self.score * 0 if self.frozen else self.score
        return straight_through(tensor, score, self.value, self.granularity)


class Gate(nn.Module):
    """Multiplies each block of a parameter by a trained factor.

    Attributes:
        factor: One factor for each block.
        granularity: The blocks.
    """

    def __init__(self, factor: Tensor, granularity: Granularity) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor)
        self.granularity = granularity

    def factors(self) -> Tensor:
        """Return the factor of each block as it acts now."""
        return self.factor

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the gated tensor, of the same shape and dtype."""
        return tensor * self.granularity.compact(self.factors(), tensor.shape).to(tensor.dtype)
