"""When a training has done what it can: it gains no more, or what was asked for is reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["EarlyStop", "is_ready"]

_MODES = ("max", "min")


class EarlyStop:
    """Says when to stop, from one number an epoch.

    While compression is still under way (``ready=False``) numbers are not judged: a metric that falls because the
    masks grow is no reason to stop, and one from before the masks is not to be compared with.

    Args:
        patience: Stop after so many reports in a row that were no better than the best; None looks only at ``target``.
        minimum_change: A report is better when it differs from the best by more than this.
        mode: Whether ``"max"`` or ``"min"`` is better.
        target: Stop as soon as a report is as good as this, such as the accuracy before compression less what may be
            lost.

    Attributes:
        best: The best number so far; None before the first.
        reports: How many numbers were judged.
        waited: How many reports ago the best was.
        reason: Why to stop: ``"target"``, ``"patience"`` or None.

    Raises:
        ConfigError: An argument is not valid.
    """

    def __init__(
        self,
        patience: int | None = 5,
        minimum_change: float = 0.0,
        mode: Literal["max", "min"] = "max",
        *,
        target: float | None = None,
    ) -> None:
        if patience is not None and (
            isinstance(patience, bool) or not isinstance(patience, int) or patience < 1
        ):
            raise ConfigError(f"patience must be at least 1, or None; got {patience!r}")
        if patience is None and target is None:
            raise ConfigError("patience None needs a target, else nothing would ever stop")
        if not minimum_change >= 0:
            raise ConfigError(f"minimum_change must not be negative, got {minimum_change!r}")
        if mode not in _MODES:
            raise ConfigError(f"mode {mode!r} is not one of {', '.join(_MODES)}{did_you_mean(mode, _MODES)}")
        self.patience, self.minimum_change, self.mode, self.target = patience, minimum_change, mode, target
        self.best: float | None = None
        self.reports = self.waited = 0
        self.reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether it said to stop."""
        return self.reason is not None

    def report(self, value: float, *, ready: bool = True) -> bool:
        """Tell a number; return whether to stop.

        Args:
            value: The metric or the loss of an epoch. NaN counts as no better than the best.
            ready: Whether compression is as far as it is to go; False lets the number go unjudged.
        """
        if not ready:
            return self.stopped
        self.reports += 1
        if self._is_better(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.target is not None and self._sign * (value - self.target) >= 0:
            self.reason = "target"
        elif self.patience is not None and self.waited >= self.patience:
            self.reason = self.reason or "patience"
        return self.stopped

    @property
    def _sign(self) -> float:
        return 1.0 if self.mode == "max" else -1.0

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return self.best is None or self._sign * (value - self.best) > self.minimum_change

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"best": self.best, "reports": self.reports, "waited": self.waited, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"best", "reports", "waited", "reason"} - set(state)
        if missing:
            raise ConfigError(f"the state of an EarlyStop needs {', '.join(sorted(missing))}")
        self.best = None if state["best"] is None else float(state["best"])
        self.reports, self.waited, self.reason = int(state["reports"]), int(state["waited"]), state["reason"]


def is_ready(compressor: Any) -> bool:
    """Whether a compressor has done what it is to do: its masks grow no more, and a stage of it has begun."""
    if getattr(compressor, "started", True) is False:
        return False
    inner = getattr(compressor, "compressor", compressor)
    return getattr(inner, "finished", True) is not False
