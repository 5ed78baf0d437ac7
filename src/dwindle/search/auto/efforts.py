"""How long a search may take, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["EFFORTS", "Effort", "effort_of"]


@dataclass(frozen=True)
class Effort:
    """How long a search may take.

    Attributes:
        trials: Candidates that are scored.
        trial_share: Share of the full training that a trial has; 0 trains nothing, and repairs instead.
        finalists: Candidates that are trained to the end.
        seconds: About how long all of it may take; None takes as long as it takes. Where training is slow there are
            fewer finalists and fewer trials, and trials are shorter.
    """

    trials: int
    trial_share: float
    finalists: int
    seconds: float | None = None

    def within(self, epoch: float, epochs: int, spent: float) -> Effort:
        """Return what fits into the time that is left; at least one candidate is tried and trained.

        Args:
            epoch: Seconds of one pass over the training data.
            epochs: Of the full training.
            spent: Seconds that are gone.
        """
        if self.seconds is None or not self.trial_share:
            return self
        left = max(self.seconds - spent, 0.0)
        finalists = max(1, min(self.finalists, int(_FINAL_SHARE * left / max(epoch * epochs, 1e-9))))
        left = max(left - finalists * epoch * epochs, 0.0)
        share, trials = self.trial_share, self.trials
        for _ in range(_HALVINGS):
            if trials * share * epochs * epoch <= left:
                break
            share /= 2
        affordable = int(left / max(share * epochs * epoch, 1e-9))
        trials = max(1, min(trials, affordable))
        return replace(self, trials=trials, trial_share=share, finalists=min(finalists, trials))


EFFORTS = {
    "seconds": Effort(4, 0.0, 1),
    "minutes": Effort(10, 0.2, 3, 600.0),
    "hours": Effort(60, 0.3, 4),
}
"""By name: how many candidates are scored, after what share of the training, and how many are trained to the end."""

#: Of the time that is left, what the full training of finalists may take.
_FINAL_SHARE = 0.6

#: Trials get at most so many times shorter by half.
_HALVINGS = 2


def effort_of(name: str, trials: int | None) -> Effort:
    """Return an effort by name, with another number of trials where that is given.

    Raises:
        ConfigError: The name is not known, or the number is not positive.
    """
    if name not in EFFORTS:
        raise ConfigError(f"effort: {name!r} is not one of {', '.join(EFFORTS)}{did_you_mean(name, EFFORTS)}")
    if trials is None:
        return EFFORTS[name]
    if trials < 1:
        raise ConfigError(f"trials: {trials} is not a positive number")
    return replace(EFFORTS[name], trials=trials, finalists=min(EFFORTS[name].finalists, trials))
