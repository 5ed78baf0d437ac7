"""Fits composed times to measured ones: a scale for each class of operators, and a constant.

What layers take by themselves differs from what they take in a model: caches are colder or warmer, runtimes fuse more,
and a call has a cost of its own. A handful of whole models, cut differently, tells by how much, and how far the sum of
layers is to be trusted beside the plainest of all predictions, a line over the multiply-accumulates: layers know which
widths are slow, the line does not add up what was measured layer by layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dwindle.config.errors import ConfigError

__all__ = ["Calibration", "PredictionError", "calibrated"]

#: How strongly scales hold to the common one: what a relative move of 1 costs, in squared relative errors.
RIDGE = 0.02

#: The least that the sum of layers is trusted, for it alone knows one layer from another.
_HALF = 0.5

#: The line has a say where held-out errors fall to this share, and by more than this: less is chance.
_BETTER, _NOTHING = 0.9, 0.001


@dataclass(frozen=True, slots=True)
class PredictionError:
    """Relative errors of predictions for models that were measured but not used for the prediction.

    Attributes:
        median: Half of the predictions are closer.
        worst: The largest.
        models: How many models were held out, one at a time.
    """

    median: float
    worst: float
    models: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How composed times become times of whole models.

    Attributes:
        constant: Seconds that every model takes.
        scales: Factor of each class of operators.
        error: Of held-out measurements.
        line: Seconds of a model without and for each multiply-accumulate.
        trust: Weight of the layers' sum; the rest is the line's.
    """

    constant: float
    scales: tuple[float, ...]
    error: PredictionError
    line: tuple[float, float] = (0.0, 0.0)
    trust: float = 1.0

    @property
    def start(self) -> float:
        """Seconds that belong to no layer."""
        return self.trust * self.constant + (1 - self.trust) * self.line[0]

    def seconds(self, composed: Sequence[float] | np.ndarray, macs: float = 0.0) -> float:
        """Return the predicted time of a model.

        Args:
            composed: Times of its classes of operators.
            macs: Its multiply-accumulates.
        """
        layers = float(self.constant + np.dot(self.scales, composed))
        return self.trust * layers + (1 - self.trust) * (self.line[0] + self.line[1] * macs)


def calibrated(
    composed: np.ndarray, measured: Sequence[float], macs: Sequence[float] | None = None
) -> Calibration:
    """Fit scales, and report the error of leaving each measurement out of its own fit.

    Args:
        composed: ``[models, classes]`` in seconds.
        measured: Seconds of each model.
        macs: Multiply-accumulates of each model; None trusts the layers alone.

    Raises:
        ConfigError: There are fewer than three models, or a time is not above zero.
    """
    composed, times = np.asarray(composed, np.float64), np.asarray(measured, np.float64)
    if len(times) < 3 or not (np.isfinite(times).all() and (times > 0).all()):
        raise ConfigError("a calibration takes at least three models with measured times above zero")
    work = None if macs is None else np.asarray(macs, np.float64)
    by_layers, by_line = np.empty(len(times)), np.empty(len(times))
    for number in range(len(times)):
        rest = np.arange(len(times)) != number
        constant, scales = _fit(composed[rest], times[rest])
        by_layers[number] = constant + composed[number] @ scales
        if work is not None:
            start, slope = _line(work[rest], times[rest])
            by_line[number] = start + slope * work[number]
    errors = {
        trust: np.abs(trust * by_layers + (1 - trust) * by_line - times) / times
        for trust in ((1.0,) if work is None else (1.0, _HALF))
    }
    trust = 1.0
    if work is not None and float(errors[_HALF].mean()) < _BETTER * float(errors[1.0].mean()) - _NOTHING:
        trust = _HALF
    constant, scales = _fit(composed, times)
    chosen = errors[trust].tolist()
    error = PredictionError(float(statistics.median(chosen)), float(max(chosen)), len(times))
    line = (0.0, 0.0) if work is None else _line(work, times)
    return Calibration(constant, tuple(scales.tolist()), error, line, trust)


def _line(macs: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Return seconds without and for each multiply-accumulate, of least squared relative error."""
    design = np.stack([1 / times, macs / times], 1)
    start, slope = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)[0]
    if start < 0 or slope < 0:  # nothing takes less than no time
        start, slope = 0.0, float(design[:, 1].sum() / (design[:, 1] ** 2).sum())
    return float(start), float(slope)


def _fit(composed: np.ndarray, times: np.ndarray) -> tuple[float, np.ndarray]:
    """Return a constant and scales, all at or above zero, of least squared relative error with a ridge.

    The ridge draws scales to the common factor of all classes, and the constant to zero.
    """
    total = composed.sum(1) / times
    common = float(total.sum() / (total**2).sum())
    # unknowns: relative moves of the scales, and the constant as a share of the smallest time
    unit = float(times.min())
    design = np.concatenate([common * composed, np.full((len(times), 1), unit)], 1) / times[:, None]
    start = np.append(np.ones(composed.shape[1]), 0.0)
    gram = design.T @ design + RIDGE * np.eye(len(start))
    target = design.T @ np.ones(len(times)) + RIDGE * start
    found = _nonnegative(gram, target, start)
    return unit * float(found[-1]), common * found[:-1]


def _nonnegative(gram: np.ndarray, target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Minimize ``x gram x / 2 - target x`` over ``x >= 0``, one coordinate after another (it is strictly convex)."""
    found = start.copy()
    for _ in range(10_000):
        before = found.copy()
        for place in range(len(found)):
            step = (target[place] - gram[place] @ found) / gram[place, place]
            found[place] = max(0.0, found[place] + step)
        if np.abs(found - before).max() < 1e-12:
            break
    return found
