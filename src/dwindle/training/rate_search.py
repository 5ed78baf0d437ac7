"""Which compression rate to try next: up in steps while all is well, then halves of what lies between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwindle.config.errors import ConfigError

__all__ = ["RateSearch"]

#: The last bits of a sum of steps must not make another trial.
_SLACK = 1e-9


class RateSearch:
    """Finds the largest rate that satisfies, told of one trial after the other.

    While trials satisfy, the rate rises by ``step``. Behind the first that does not, each trial halves the distance
    between the largest rate that satisfied and the smallest above it that did not, until that is ``minimum_step`` or
    less. Where satisfying is monotone (what satisfies at a rate does so at all smaller ones), the rate that is found
    is at most ``minimum_step`` below the largest one that there is. Where it is not, what is found satisfies, and a
    rate within ``minimum_step`` above it does not.

    Args:
        step: First distance between two rates.
        minimum_step: Last distance.
        first: The first rate; None begins with ``step``.
        largest: No rate is above.

    Attributes:
        best: The largest rate that satisfied; None while there is none.
        failed: The smallest rate above :attr:`best` that did not; None while there is none.

    Raises:
        ConfigError: The numbers do not fit.
    """

    def __init__(
        self,
        step: float = 0.1,
        minimum_step: float = 0.025,
        *,
        first: float | None = None,
        largest: float = 1.0,
    ) -> None:
        first = step if first is None else first
        if not 0 < minimum_step <= step:
            raise ConfigError(f"minimum_step {minimum_step} must be above 0, and at most step, {step}")
        if not 0 < first <= largest:
            raise ConfigError(f"the first rate {first} must be above 0, and at most the largest, {largest}")
        self.step, self.minimum_step, self.first, self.largest = step, minimum_step, first, largest
        self.best: float | None = None
        self.failed: float | None = None

    def next(self) -> float | None:
        """Return the rate to try; None when there is nothing left to try."""
        if self.failed is None:
            if self.best is None:
                return self.first
            if self.best >= self.largest - _SLACK:
                return None
            above = self.best + self.step
            return self.largest if above > self.largest - _SLACK else round(above, 12)
        low = self.best or 0.0
        if self.failed - low <= self.minimum_step + _SLACK:
            return None
        return low + (self.failed - low) / 2

    def tell(self, rate: float, satisfied: bool) -> None:
        """Take in a trial of the rate that :meth:`next` gave."""
        if satisfied:
            self.best = rate
        else:
            self.failed = rate

    @property
    def ended(self) -> str | None:
        """Why nothing is left to try; None while something is."""
        if self.next() is not None:
            return None
        return "the largest rate satisfies" if self.failed is None else "the step became small"

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"best": self.best, "failed": self.failed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.best, self.failed = state["best"], state["failed"]
