"""The importances of ``dw.prune`` by name, and what a caller may give in place of a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.pruning.activation_energy import Activation
from dwindle.pruning.axis_importance import AxisImportance, GroupNorm, WeightImportance
from dwindle.pruning.importance import fpgm, l1, l2, random
from dwindle.pruning.measured import Fisher, Hessian, Outputs, Taylor

#: A criterion of one weight: ``f(weight, dim)`` gives one score for each index, larger is more important.
Criterion = Callable[[Tensor, int], Tensor]

AXIS_IMPORTANCES: dict[str, Callable[[], AxisImportance]] = {
    "l1": lambda: WeightImportance(l1),
    "l2": lambda: WeightImportance(l2),
    "fpgm": lambda: WeightImportance(fpgm),
    "random": lambda: WeightImportance(random),
    "group_norm": GroupNorm,
    "taylor": Taylor,
    "fisher": Fisher,
    "hessian": Hessian,
    "outputs": Outputs,
    "activation": Activation,
}
"""Importances by name, as ``dw.prune(importance=...)`` takes them; each call makes a new one."""


def importance_of(given: str | Criterion | AxisImportance, *, comparable: bool = False) -> AxisImportance:
    """Return the importance that a caller means.

    Args:
        given: A name, a function of a weight and a dimension, or an importance.
        comparable: Leave what a name means in its own unit where all axes have the same one (of importances that run
            the model), in place of dividing by the mean of each axis.

    Raises:
        ConfigError: It is none of these, or the name is not known.
    """
    if isinstance(given, AxisImportance):
        return given
    if isinstance(given, str):
        if given not in AXIS_IMPORTANCES:
            known = list(AXIS_IMPORTANCES)
            raise ConfigError(
                f"importance: {given!r} is not one of {', '.join(known)}{did_you_mean(given, known)}"
            )
        found = AXIS_IMPORTANCES[given]()
        if comparable and found.needs_data:
            found.normalize = "none"
        return found
    if callable(given) and not isinstance(given, type):
        return WeightImportance(given)
    raise ConfigError(
        f"importance: {given!r} is no name, no function f(weight, dim) and no importance (Taylor(), GroupNorm(), ...)"
    )


def check_data(importance: AxisImportance, data: Any) -> None:
    """See that an importance that runs the model has data, and that no other has.

    Raises:
        ConfigError: Saying what to do.
    """
    name = type(importance).__name__
    if importance.needs_data and data is None:
        raise ConfigError(
            f"importance: {name} runs the model; give data=, batches as your training loop has them"
        )
    if data is not None and not importance.needs_data:
        raise ConfigError(
            f"data: {name} looks at weights alone; leave data= out, or choose an importance that uses it, such as "
            "'taylor', 'fisher', 'outputs' or 'activation'"
        )
