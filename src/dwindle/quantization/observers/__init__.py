"""Observers: they watch values go by and answer which range of them to quantize."""

from __future__ import annotations

from collections.abc import Callable

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.observers.base import Observer
from dwindle.quantization.observers.entropy import EntropyObserver
from dwindle.quantization.observers.histogram import HistogramObserver
from dwindle.quantization.observers.minmax import MinMaxObserver
from dwindle.quantization.observers.moving_average import MovingAverageObserver
from dwindle.quantization.observers.percentile import PercentileObserver

OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "histogram": HistogramObserver,
    "entropy": EntropyObserver,
}
"""The observers by name, as ``dw.quantize(..., observer=...)`` takes them."""


def make_observer(observer: str | Callable[[], Observer]) -> Observer:
    """Return a fresh observer from its name or from a function that makes one.

    Raises:
        ConfigError: The name is not known.
    """
    if not isinstance(observer, str):
        return observer()
    if observer not in OBSERVERS:
        raise ConfigError(
            f"observer {observer!r} is not known: {', '.join(OBSERVERS)}{did_you_mean(observer, OBSERVERS)}"
        )
    return OBSERVERS[observer]()


__all__ = [
    "OBSERVERS",
    "EntropyObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
]
