"""What is to be factorized: which layers, how, and at which ranks; nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dwindle.config import resolve
from dwindle.config.errors import ConfigError
from dwindle.config.schema import FactorizationSetting
from dwindle.config.selection import ModuleIndex
from dwindle.factorization.allocation import Choices, allocate
from dwindle.factorization.forms import check_method
from dwindle.factorization.layers import FactorizedLayer
from dwindle.factorization.ranks import LayerProblem, said_ranks
from dwindle.simulate.host import plain_class, table_of
from dwindle.training.linear_layers import is_linear_layer

__all__ = ["UNITS", "check_target", "chosen_ranks", "selected_settings", "unfit_layers"]

UNITS = ("macs", "params")

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_target(target: Mapping[str, float] | None) -> tuple[str, float | None]:
    """Return the unit of costs, and the share that is to stay (None: no target).

    Raises:
        ConfigError: The target has another form.
    """
    if target is None:
        return "macs", None
    if len(target) != 1 or next(iter(target)) not in UNITS:
        raise ConfigError(f"target: give exactly one of {', '.join(UNITS)}, got {sorted(target)}")
    ((unit, share),) = target.items()
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"target: {unit} = {share!r} is not a share between 0 and 1")
    return unit, float(share)


def selected_settings(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]] | None, common: FactorizationSetting
) -> dict[str, FactorizationSetting]:
    """Return the setting of each layer that is asked for: every linear layer and convolution without a config_list.

    Args:
        model: The model.
        config_list: Entries of the kind ``factorization``.
        common: What holds where an entry does not say otherwise.

    Raises:
        ConfigError: The list is not valid, or selects something that is no linear layer.
    """
    check_method(common.method)
    if config_list is None:
        modules = ModuleIndex(model).by_name
        return {name: common for name, module in modules.items() if name and is_linear_layer(module)}
    plain = {"method": common.method, "round_to": common.round_to, "minimum": common.minimum}
    found: dict[str, FactorizationSetting] = {}
    for target, setting in resolve(model, config_list, "factorization", defaults=plain).items():
        module = model.get_submodule(target.module)
        if target.name != "weight" or not is_linear_layer(module):
            raise ConfigError(
                f"{target}: only weights of Linear, Conv1d, Conv2d, Conv3d and Conv1D layers can be factorized, not "
                f"{target.name!r} of a {type(module).__name__}; exclude it with exclude_op_names"
            )
        if not target.module:
            raise ConfigError("the model itself is the layer; put it into a module that can hold another one")
        if setting.rank is None and setting.rank_ratio is None and setting.energy is None:
            goal = {name: getattr(common, name) for name in ("rank", "rank_ratio", "energy")}
            setting = setting.model_copy(update=goal)
        found[target.module] = setting
    return found


def unfit_layers(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return why layers stay as they are whatever the ranks, by path; those that can be factorized are missing."""
    holders: dict[int, dict[int, str]] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), {}).setdefault(id(module), path)
        if isinstance(module, FactorizedLayer):
            inside |= {id(part) for part in module}
    found = {}
    for name in names:
        module = model.get_submodule(name)
        reason = "it is part of a factorized layer" if id(module) in inside else _unfit(module, holders)
        if reason:
            found[name] = reason
    return found


def _unfit(module: nn.Module, holders: Mapping[int, Mapping[int, str]]) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by something else (a parametrization), not held"
    if weight.is_meta or not weight.is_floating_point():
        return f"its weight is {'on the meta device' if weight.is_meta else weight.dtype}"
    if table_of(module) is not None:
        return "it carries masks or other simulators; make them real first (dw.realize, or leave the run)"
    others = [path for other, path in holders[id(weight)].items() if other != id(module)]
    if others:
        return f"its weight is shared with {others[0]!r}"
    if getattr(module, "groups", 1) != 1:
        return f"it has {module.groups} groups"
    own = plain_class(module)
    base = next((base for base in _PLAIN if issubclass(own, base)), None)
    if base is None:
        return "" if own.__name__ == "Conv1D" else f"{own.__name__} changes what Conv1D computes"
    if own.forward is not base.forward or getattr(own, "_conv_forward", None) is not getattr(
        base, "_conv_forward", None
    ):
        return f"{own.__name__} has a forward of its own"
    return ""


def chosen_ranks(
    problems: Mapping[str, LayerProblem],
    settings: Mapping[str, FactorizationSetting],
    *,
    unit: str,
    budget: float | None,
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the ranks of the layers that become chains, and why the others stay whole.

    Args:
        problems: The layers.
        settings: Their settings.
        unit: ``macs`` or ``params``.
        budget: For all these layers together; None where every setting says its own rank.

    Raises:
        ConfigError: A rank does not fit, no rank is given, or the budget is too small.
    """
    ranks: dict[str, tuple[int, ...]] = {}
    left: dict[str, str] = {}
    open_layers: list[str] = []
    for name, problem in problems.items():
        try:
            said = said_ranks(problem, settings[name])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if said is None:
            if budget is None:
                raise ConfigError(f"{name}: no rank; give rank, rank_ratio, energy or a target")
            open_layers.append(name)
        elif (reason := _no_gain(problem, said, unit)) is not None:
            left[name] = reason
        else:
            ranks[name] = said
    if budget is not None and ranks and not open_layers:
        raise ConfigError("target: every layer has a rank of its own; leave the target or some ranks out")
    if open_layers and budget is not None:
        budget -= sum(problems[name].cost(own, unit) for name, own in ranks.items())
        budget -= sum(problems[name].whole_cost(unit) for name in left)
        _allocate({name: problems[name] for name in open_layers}, settings, unit, budget, ranks, left)
    return ranks, left


def _allocate(
    problems: Mapping[str, LayerProblem],
    settings: Mapping[str, FactorizationSetting],
    unit: str,
    budget: float,
    ranks: dict[str, tuple[int, ...]],
    left: dict[str, str],
) -> None:
    """Spread a budget over layers; adds to ``ranks`` and ``left``."""
    tables: list[Choices] = []
    meanings = []
    for name, problem in problems.items():
        try:
            table, meaning = problem.choices(unit, settings[name].round_to, settings[name].minimum)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        tables.append(table)
        meanings.append(meaning)
    chosen = allocate(tables, budget)
    for name, meaning, pick in zip(problems, meanings, chosen.choices, strict=True):
        if pick == len(meaning):
            left[name] = "the target loses least when it stays whole"
        else:
            ranks[name] = tuple(int(rank) for rank in meaning[pick])


def _no_gain(problem: LayerProblem, ranks: tuple[int, ...], unit: str) -> str | None:
    """Return why these ranks would save nothing; None when they do."""
    share = problem.cost(ranks, unit) / max(problem.whole_cost(unit), 1)
    if share < 1:
        return None
    what = {"macs": "multiply-accumulates", "params": "parameters"}[unit]
    shown = "x".join(map(str, ranks))
    hint = ""
    if len(ranks) == 1:
        price = problem.cost((1,), unit)
        most = int((problem.whole_cost(unit) - 1) // price) if price else 0
        hint = f"; up to {most} it would save some" if most > 0 else "; no rank saves any"
    return f"rank {shown} would take {share:.2f} times its {what}{hint}"


def layer_weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer holds."""
    weight = module._parameters["weight"]
    assert weight is not None  # those without one were left out
    return weight
