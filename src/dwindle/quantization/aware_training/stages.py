"""When what starts in quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass

from dwindle.config.errors import ConfigError


@dataclass(frozen=True)
class QuantizationStages:
    """Steps of the optimizer at which quantization-aware training goes on to its next stage.

    Attributes:
        weights: Weights are rounded from this step on.
        activations: Activations are rounded from this step on. Where that is later than 0, their ranges are those
            of the steps before (:attr:`watch` of them); otherwise those of the calibration data.
        watch: Steps before :attr:`activations` whose ranges count.
        freeze_ranges: Ranges that follow the batches stand still from this step on; None lets them go on. Learned
            ranges are not touched.
        freeze_normalization: Folded batch normalizations take their running statistics from this step on, as in
            evaluation; None keeps the batches' own (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2).

    Raises:
        ConfigError: A step is negative or not a whole number.
    """

    weights: int = 0
    activations: int = 0
    watch: int = 100
    freeze_ranges: int | None = None
    freeze_normalization: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = name.startswith("freeze")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "watch"):
                raise ConfigError(f"stages.{name} is a number of steps, 0 or more; not {value!r}")
