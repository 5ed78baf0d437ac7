"""NNI's search spaces: nested dicts with ``_type``, ``_value`` and ``_name``, drawn with Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["TYPES", "draw"]

Draw = Callable[[Any, str, Sequence[Any], str], Any]


def draw(trial: Any, space: Any, name: str = "") -> Any:
    """Draw a value for everything in a search space.

    Args:
        trial: An Optuna trial.
        space: ``{"_type": "choice", "_value": [...]}`` and the like, dicts and lists of such, or plain values.
        name: What stands above it; names of parameters are paths such as ``pruner/l1/sparsity``.

    Raises:
        ConfigError: A type is not known, or its values do not fit.
    """
    if isinstance(space, Mapping) and "_type" in space:
        kind, values = space["_type"], space.get("_value")
        if kind not in TYPES:
            raise ConfigError(
                f"{name}: _type {kind!r} is not one of {', '.join(TYPES)}{did_you_mean(str(kind), TYPES)}"
            )
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"{name}: _value must be a list, not {values!r}")
        return TYPES[kind](trial, name, values, kind)
    if isinstance(space, Mapping):
        return {key: draw(trial, own, _below(name, key)) for key, own in space.items()}
    if isinstance(space, list | tuple):
        return [draw(trial, own, _below(name, place)) for place, own in enumerate(space)]
    return space


def _choice(trial: Any, name: str, values: Sequence[Any], kind: str) -> Any:
    """One of several; those that are dicts may be spaces of their own, with a ``_name``."""
    labels = [_label(value, place) for place, value in enumerate(values)]
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"{name}: two choices are called {next(own for own in labels if labels.count(own) > 1)!r}"
        )
    chosen = labels.index(trial.suggest_categorical(name, labels)) if len(labels) > 1 else 0
    return draw(trial, values[chosen], _below(name, labels[chosen]))


def _label(value: Any, place: int) -> Any:
    if isinstance(value, Mapping):
        return value.get("_name", str(place))
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _range(trial: Any, name: str, values: Sequence[Any], kind: str) -> Any:
    """``uniform``, ``loguniform``, ``quniform``, ``qloguniform`` (low, high, and the step of the q ones)."""
    stepped = kind.startswith("q")
    if len(values) != (3 if stepped else 2):
        raise ConfigError(
            f"{name}: {kind} takes [low, high{', step' if stepped else ''}], not {list(values)}"
        )
    low, high = float(values[0]), float(values[1])
    found = low if low == high else trial.suggest_float(name, low, high, log=kind.endswith("loguniform"))
    return min(max(round(found / values[2]) * values[2], low), high) if stepped else found


def _normal(trial: Any, name: str, values: Sequence[Any], kind: str) -> Any:
    """``normal`` and ``lognormal`` (mean, deviation), within three deviations; the q ones with a step."""
    stepped = kind.startswith("q")
    mean, deviation = float(values[0]), float(values[1])
    own = f"{name}/deviations"
    found = mean + deviation * trial.suggest_float(own, -3.0, 3.0)
    found = math.exp(found) if kind.endswith("lognormal") else found
    return round(found / values[2]) * values[2] if stepped else found


def _integer(trial: Any, name: str, values: Sequence[Any], kind: str) -> Any:
    """``randint``: low included, high not."""
    if len(values) != 2 or values[0] >= values[1]:
        raise ConfigError(f"{name}: randint takes [low, high] with high above low, not {list(values)}")
    return trial.suggest_int(name, int(values[0]), int(values[1]) - 1)


TYPES: dict[str, Draw] = {
    "choice": _choice,
    "randint": _integer,
    **dict.fromkeys(("uniform", "loguniform", "quniform", "qloguniform"), _range),
    **dict.fromkeys(("normal", "lognormal", "qnormal", "qlognormal"), _normal),
}
"""Every ``_type``. ``normal`` draws are even within three deviations: a search has no use for rare values."""


def _below(name: str, key: Any) -> str:
    return f"{name}/{key}" if name else str(key)
