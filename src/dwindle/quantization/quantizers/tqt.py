"""Trained quantization thresholds (TQT, Jain et al. 2020, arXiv 1903.08066)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.learned import (
    ScaledQuantizer,
    alive,
    checked,
    checked_sample,
    first_scale,
    positive,
    straight,
)
from dwindle.quantization.quantizers.rounding import STRAIGHT_THROUGH, Bounds, learned_round


class TqtQuantizer(ScaledQuantizer):
    """Learns the logarithm of a threshold; steps are powers of two, so that integer kernels only shift.

    ``scale = 2^ceil(log2 t) / 2^(bits - 1)``, or ``/ 2^bits`` for unsigned levels. The gradient of ``log2 t`` is
    ``scale ln 2`` times ``round(v) - v`` inside and the nearest level outside, and passes through ``ceil``. Weights
    start at three standard deviations, activations at the range they are given, which the observer chose.

    Args:
        form: The levels.
        axis: The dimension with one threshold for each index, or None for one.
        activation: True for activations.
        power_of_two: False leaves ``ceil`` out: the scale is then any number, learned by its logarithm.

    Attributes:
        log2_threshold: A parameter.
        steps: The power of two that divides, a buffer.
    """

    log2_threshold: Tensor
    steps: Tensor
    zero_point: Tensor

    def __init__(
        self,
        form: NumberFormat,
        axis: int | None = None,
        *,
        activation: bool = False,
        power_of_two: bool = True,
    ) -> None:
        super().__init__(form, axis, activation=activation)
        self.power_of_two = power_of_two
        self.learn("log2_threshold")
        self.follow("steps")

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the threshold.

        Args:
            low: Smallest values, one or one per channel.
            high: Largest values.
            sample: A weight; then three standard deviations of it are the threshold. Not used for activations.

        Raises:
            ConfigError: NaN, infinity, or no range at all.
        """
        low, high = checked(low, high)
        scale, zero_point = first_scale(low, high, self.form)
        widest = torch.maximum(self.form.highest + 1 - zero_point, zero_point - self.form.lowest)
        steps = torch.exp2(torch.log2(widest.float()).ceil())
        threshold = torch.maximum(-low, high)
        if sample is not None and not self.activation:
            threshold = 3 * checked_sample(sample, self.axis).std(1, correction=0).reshape(low.shape)
        # A zero point between the ends leaves less than half of the levels to either side: cover what is wider.
        between = (zero_point > self.form.lowest) & (not self.form.symmetric)
        threshold = torch.where(between, scale * steps, alive(threshold / steps, self.form) * steps)
        self.put(log2_threshold=torch.log2(threshold), steps=steps, zero_point=zero_point)

    def forward(self, value: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Round to the learned steps.

        Args:
            value: Any floating tensor.
            bounds: Clip to these first.
        """
        return learned_round(
            value,
            self._scale(),
            self.moved_zero,
            self.form,
            self.axis,
            gradient=STRAIGHT_THROUGH,
            bounds=bounds,
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the step of the learned threshold and the zero point of the start."""
        return self._scale().detach().float(), self.zero_point

    def _scale(self) -> Tensor:
        exponent = self.require(self.log2_threshold)
        if self.power_of_two:
            exponent = straight(exponent.ceil(), exponent)
        return positive(torch.exp2(exponent) / self.steps)
