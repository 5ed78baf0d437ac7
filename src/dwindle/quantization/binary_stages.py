"""When what becomes binary: the four stages of a binarization, as a value that only needs the step number."""

from __future__ import annotations

from dataclasses import dataclass

from dwindle.config.errors import ConfigError

__all__ = ["BinaryStages"]


@dataclass(frozen=True)
class BinaryStages:
    """Four stages: float, binary activations, binary weights too, and a learning rate that falls to its end.

    Kozlov et al. (NNCF), https://arxiv.org/abs/2002.08679, section 3.2: plain training first, then activations, then
    weights, then a polynomial fall of the learning rate with no weight decay. All zeros is "at once".

    Attributes:
        activations: Steps before activations are binary.
        weights: Steps before weights are, not fewer than ``activations``.
        decay: Steps before the learning rate falls and weight decay ends; None never does so.
        end: The step at which the learning rate has fallen to nothing; needed with ``decay``.
        power: Of the fall.

    Raises:
        ConfigError: The stages are out of order.
    """

    activations: int = 0
    weights: int = 0
    decay: int | None = None
    end: int | None = None
    power: float = 2.1

    def __post_init__(self) -> None:
        for name in ("activations", "weights", "decay", "end"):
            value = getattr(self, name)
            if value is None and name in ("decay", "end"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}: {value!r} is not a whole number from 0 on")
        if self.weights < self.activations:
            raise ConfigError(
                f"weights become binary after {self.weights} steps, before activations do ({self.activations})"
            )
        if (self.decay is None) != (self.end is None):
            raise ConfigError("decay and end belong together")
        if self.decay is not None and self.end is not None and not self.weights <= self.decay < self.end:
            raise ConfigError(
                f"decay must lie between weights ({self.weights}) and end, got {self.decay} and {self.end}"
            )
        if not self.power > 0:
            raise ConfigError(f"power must be positive, got {self.power!r}")

    @classmethod
    def over(cls, steps: int, shares: tuple[float, float, float] = (0.2, 0.4, 0.7)) -> BinaryStages:
        """Spread the stages over a run.

        Args:
            steps: Optimizer steps of the whole run.
            shares: Where activations, weights and the fall begin, as shares of it.

        Raises:
            ConfigError: The stages are out of order.
        """
        first, second, third = (round(steps * share) for share in shares)
        return cls(first, second, third, steps)

    def stage(self, step: int) -> int:
        """Return the stage, 1 to 4, of the step after ``step`` steps."""
        if self.decay is not None and step >= self.decay:
            return 4
        return 1 + (step >= self.activations) + (step >= self.weights)

    def learning_rate_factor(self, step: int) -> float:
        """Return what the learning rate is multiplied by after ``step`` steps: ``(1 - t)**power`` in stage four.

        Fits ``torch.optim.lr_scheduler.LambdaLR``.
        """
        if self.decay is None or self.end is None:
            return 1.0
        way = min(max((step - self.decay) / (self.end - self.decay), 0.0), 1.0)
        return float((1.0 - way) ** self.power)
