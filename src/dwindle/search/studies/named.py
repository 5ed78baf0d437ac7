"""Samplers and pruners by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from dwindle.config.callables import call_checked, import_callable
from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["PRUNERS", "SAMPLERS", "make_pruner", "make_sampler"]


def _tpe(seed: int, population: int, **options: Any) -> BaseSampler:
    return optuna.samplers.TPESampler(**{"multivariate": True, "group": True, **options}, seed=seed)


def _nsga2(seed: int, population: int, **options: Any) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(**{"population_size": population, **options}, seed=seed)


def _random(seed: int, population: int, **options: Any) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[..., BaseSampler]] = {"tpe": _tpe, "nsga2": _nsga2, "random": _random}
"""``make(seed, population, **options)`` by name: the tree-structured Parzen estimator (Bergstra et al. 2011), NSGA-II
(Deb et al. 2002), and chance."""

PRUNERS: Mapping[str, Callable[..., BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
}
"""Pruners by name."""


def make_sampler(name: str, seed: int, population: int, options: Mapping[str, Any]) -> BaseSampler:
    """Make a sampler.

    Args:
        name: In :data:`SAMPLERS`, or ``package.module:callable`` that is called with ``seed`` and the options.
        seed: Of its random numbers.
        population: Trials of one generation of an evolution.
        options: Further arguments.

    Raises:
        ConfigError: There is no such sampler, or it refuses the options.
    """
    if ":" in name:
        made = call_checked(import_callable(name, "sampler"), {"seed": seed, **options}, name)
    else:
        _check("sampler", name, SAMPLERS)
        made = _called("sampler", name, SAMPLERS[name], {"seed": seed, "population": population, **options})
    if not isinstance(made, BaseSampler):
        raise ConfigError(f"the sampler {name!r} gave a {type(made).__name__}, not a sampler of Optuna")
    return made


def make_pruner(name: str, options: Mapping[str, Any]) -> BasePruner:
    """Make a pruner.

    Args:
        name: In :data:`PRUNERS`, or ``package.module:callable``.
        options: Its arguments.

    Raises:
        ConfigError: There is no such pruner, or it refuses the options.
    """
    if ":" in name:
        made = call_checked(import_callable(name, "pruner"), dict(options), name)
    else:
        _check("pruner", name, PRUNERS)
        made = _called("pruner", name, PRUNERS[name], options)
    if not isinstance(made, BasePruner):
        raise ConfigError(f"the pruner {name!r} gave a {type(made).__name__}, not a pruner of Optuna")
    return made


def _check(what: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ConfigError(
            f"there is no {what} {name!r}; known are {', '.join(known)}, or package.module:callable"
            f"{did_you_mean(name, known)}"
        )


def _called(what: str, name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the {what} {name!r}: {error}") from error
