"""Times several functions against each other, fairly.

Machines drift: they heat up, other programs come and go. Functions that are timed one after the other are
therefore not comparable. Here every round calls each function once, in an order shuffled anew for each
round (by a fixed seed), so that a disturbance meets all of them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dwindle.config.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """Times of one forward pass, in milliseconds of wall time.

    Attributes:
        p50: Median.
        p90: The time that nine of ten calls stay below.
        minimum: The fastest call.
        runs: How many calls were timed.
    """

    p50: float
    p90: float
    minimum: float
    runs: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Summarize measured times (milliseconds, at least one)."""
        return cls(
            p50=percentile(milliseconds, 0.5),
            p90=percentile(milliseconds, 0.9),
            minimum=min(milliseconds),
            runs=len(milliseconds),
        )


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the given percentile with linear interpolation between neighbours, as NumPy does by default.

    Args:
        values: At least one number.
        fraction: Between 0 and 1.
    """
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def time_interleaved(
    functions: Mapping[Key, Callable[[], Any]],
    *,
    warmup: int = 5,
    repeats: int = 50,
    max_seconds: float | None = 30.0,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> dict[Key, list[float]]:
    """Call each function once a round, and time each call.

    Args:
        functions: What to time, by name.
        warmup: Rounds before timing starts.
        repeats: Timed rounds.
        max_seconds: Timed rounds stop early after this many seconds in all, but not before three rounds are
            done. None means no limit.
        clock: Gives seconds; for tests.
        seed: Of the order of calls inside each round.

    Returns:
        Milliseconds of each timed call, by name; the same number for each.

    Raises:
        ConfigError: ``repeats`` is below 1 or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    order = list(functions)
    shuffle = random.Random(seed).shuffle
    for _ in range(warmup):
        for name in order:
            functions[name]()
    times: dict[Key, list[float]] = {name: [] for name in functions}
    begin = clock()
    for done in range(repeats):
        if done >= 3 and max_seconds is not None and clock() - begin > max_seconds:
            break
        shuffle(order)
        for name in order:
            start = clock()
            functions[name]()
            times[name].append((clock() - start) * 1e3)
    return times
