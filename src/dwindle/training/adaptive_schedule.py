"""A schedule that asks the training how it bears what was asked so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dwindle.config.errors import ConfigError

__all__ = ["AdaptiveSchedule"]


class AdaptiveSchedule:
    """A value that rises by ``increment`` whenever the training has recovered from the last rise.

    It is told the loss from time to time (:meth:`report`, once an epoch or so). A report is good when the loss is no
    more than ``tolerance`` above the smallest loss reported so far, and, where the sparsity that was really reached
    is told too, when that is no more than ``reach`` below the value. After ``patience`` good reports the value rises.

    Args:
        start: The first value.
        end: The last value.
        increment: How far it moves at a time.
        patience: Good reports between two moves, at least 1.
        tolerance: Relative to the smallest loss: 0.05 accepts a loss 5 % above it.
        reach: How much less than the value may be reached.

    Raises:
        ConfigError: An argument is not valid.
    """

    def __init__(
        self,
        start: float = 0.0,
        end: float = 1.0,
        *,
        increment: float = 0.05,
        patience: int = 1,
        tolerance: float = 0.05,
        reach: float = 0.03,
    ) -> None:
        if not start <= end:
            raise ConfigError(f"start {start} is above end {end}")
        if not increment > 0:
            raise ConfigError(f"increment must be above 0, got {increment}")
        if patience < 1:
            raise ConfigError(f"patience must be at least 1, got {patience}")
        if not (tolerance >= 0 and reach >= 0):
            raise ConfigError("tolerance and reach must not be negative")
        self.start, self.end, self.increment = float(start), float(end), float(increment)
        self.patience, self.tolerance, self.reach = patience, tolerance, reach
        self.value = self.start
        self.best = math.inf
        self.good = 0

    def __call__(self, step: int) -> float:
        """Return the value now, whatever the step is."""
        return self.value

    def report(self, loss: float, achieved: float | None = None) -> float:
        """Tell the loss; the value may rise.

        Args:
            loss: Mean loss since the last report, or anything else that is to stay small.
            achieved: What was really reached (a sparsity); None when it is exact.

        Returns:
            The value from now on.

        Raises:
            ConfigError: The loss is not finite.
        """
        if not math.isfinite(loss):
            raise ConfigError(f"the reported loss is {loss}")
        limit = self.best + self.tolerance * abs(self.best) if math.isfinite(self.best) else math.inf
        self.best = min(self.best, loss)
        # the last bits of a sum of increments must not cost a report
        reached = achieved is None or achieved >= self.value - self.reach - 1e-9
        if loss <= limit and reached:
            self.good += 1
        if self.good >= self.patience:
            self.good = 0
            moved = self.value + self.increment
            self.value = self.end if moved > self.end - 1e-9 else moved
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        best = self.best if math.isfinite(self.best) else None
        return {"value": self.value, "best": best, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"value", "best", "good"} - set(state)
        if missing:
            raise ConfigError(f"the state of an adaptive schedule needs {', '.join(sorted(missing))}")
        self.value, self.good = float(state["value"]), int(state["good"])
        self.best = math.inf if state["best"] is None else float(state["best"])
