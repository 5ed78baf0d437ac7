"""Parameterized clipping of activations (PACT, Choi et al. 2018, arXiv 1805.06085)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.learned import ScaledQuantizer, checked, first_scale, positive
from dwindle.quantization.quantizers.rounding import Bounds, Gradient, learned_round

_PACT = Gradient("upper_open", rounding=0.0)


class PactQuantizer(ScaledQuantizer):
    """Learns where activations are clipped; only clipped values say where.

    ``y = clamp(x, 0, clip)``, rounded. The gradient of ``clip`` is 1 where ``x >= clip`` and 0 elsewhere; that of ``x``
    passes where ``0 <= x < clip``. Where levels lie below zero too, the range is cut there in proportion, and such
    values add their share ``(lowest - zero_point) / (highest - zero_point)``.

    The paper adds ``decay * clip²`` to the loss: see :meth:`penalty` (or give this parameter a weight decay).

    Args:
        form: The levels.
        axis: The dimension with one clip for each index, or None for one clip.
        activation: True for activations.
        start: First value of ``clip`` (the paper: 10); None takes the first range.

    Attributes:
        clip: The highest value, a parameter.
    """

    clip: Tensor
    zero_point: Tensor

    def __init__(
        self,
        form: NumberFormat,
        axis: int | None = None,
        *,
        activation: bool = True,
        start: float | None = None,
    ) -> None:
        super().__init__(form, axis, activation=activation)
        self.start = start
        self.learn("clip")

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the clip to ``start``, or to the end of a range.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: Not needed.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        scale, zero_point = first_scale(low, high, self.form)
        clip = scale * self.reach(zero_point)
        self.put(
            clip=clip if self.start is None else torch.full_like(clip, self.start), zero_point=zero_point
        )

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Clip and round.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        return learned_round(
            value, self._scale(), self.moved_zero, self.form, self.axis, gradient=_PACT, bounds=bounds
        )

    def end_at(self, bound: float) -> None:
        """Let no level stand for more than a bound: the clip is at most that."""
        with torch.no_grad():
            self.require(self.clip).clamp_(max=bound)

    def penalty(self) -> Tensor:
        """Return the sum of squared clips, to add to the loss times the paper's decay."""
        return self.require(self.clip).square().sum()

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the step of the learned clip and the zero point of the start."""
        return self._scale().detach().float(), self.zero_point

    def _scale(self) -> Tensor:
        return positive(self.require(self.clip) / self.reach(self.zero_point))
