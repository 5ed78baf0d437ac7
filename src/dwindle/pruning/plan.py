"""What a pruner is going to prune: targets with their settings and blocks, checked before the model is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dwindle.config import Granularity, PruningSetting, Target, resolve
from dwindle.config.errors import ConfigError


@dataclass(frozen=True)
class PlannedTarget:
    """One parameter that has a goal.

    Attributes:
        target: The parameter.
        setting: What the config says about it.
        granularity: Its blocks.
        shape: Its shape.
    """

    target: Target
    setting: PruningSetting
    granularity: Granularity
    shape: tuple[int, ...]

    @property
    def block_size(self) -> int:
        """Number of weights in one block."""
        return math.prod(self.shape) // max(self.granularity.block_count(self.shape), 1)


@dataclass(frozen=True)
class PruningPlan:
    """All targets of a config_list.

    Attributes:
        settings: Every setting by target, in the model's order.
        goals: The parameters that are ranked.
    """

    settings: dict[Target, PruningSetting]
    goals: dict[Target, PlannedTarget]


def make_plan(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], granularity: str | None
) -> PruningPlan:
    """Check a config_list against a model.

    Args:
        model: The model, only read.
        config_list: The entries.
        granularity: What ``granularity: "default"`` means for this pruner.

    Raises:
        ConfigError: Naming the entry or the target and what is wrong.
    """
    settings: dict[Target, PruningSetting] = resolve(model, config_list, "pruning")
    modules = dict(model.named_modules())
    goals = {}
    for target, setting in settings.items():
        if not setting.has_goal:
            continue
        if not target.is_parameter:
            raise ConfigError(
                f"{target}: this pruner ranks parameters; an input or output can only follow one: give it "
                f"'align' with module_name, target_name and dims"
            )
        module = modules[target.module]
        parameter = module._parameters.get(target.name)
        if parameter is None or not parameter.is_floating_point():
            raise ConfigError(f"{target}: only floating point parameters can be pruned")
        blocks = Granularity.of_module(setting.granularity, module, target, default=granularity)
        blocks.check(parameter.shape, str(target))
        goals[target] = PlannedTarget(target, setting, blocks, tuple(parameter.shape))
    _check_groups(goals)
    return PruningPlan(settings, goals)


def with_ratios(
    plan: PruningPlan,
    ratios: Mapping[Target, float],
    others: Mapping[Target, Mapping[str, Any]] | None = None,
) -> PruningPlan:
    """Return the plan with other ratios.

    Args:
        plan: The plan.
        ratios: A new ``sparse_ratio`` for some of its goals.
        others: Further changes to the settings of some of these (``max_sparse_ratio``, ...).
    """
    settings = dict(plan.settings)
    for target, ratio in ratios.items():
        changed = {"sparse_ratio": ratio, **(others or {}).get(target, {})}
        settings[target] = settings[target].model_copy(update=changed)
    goals = {target: replace(planned, setting=settings[target]) for target, planned in plan.goals.items()}
    return PruningPlan(settings, goals)


def _check_groups(goals: Mapping[Target, PlannedTarget]) -> None:
    """Check what the targets of one group must have in common."""
    shapes: dict[int | str, PlannedTarget] = {}
    ratios: dict[int | str, PlannedTarget] = {}
    for planned in goals.values():
        setting, own = planned.setting, planned.granularity.block_shape(planned.shape)
        if planned.granularity.kind == "pattern" and (
            setting.global_group_id is not None or setting.dependency_group_id is not None
        ):
            raise ConfigError(f"{planned.target}: an N:M pattern cannot be ranked in a group")
        _check_sizes(planned)
        parts = setting.internal_metric_block or 1
        if math.prod(own) % parts:
            raise ConfigError(
                f"{planned.target}: internal_metric_block {parts} does not divide {math.prod(own)} blocks"
            )
        if setting.dependency_group_id is not None:
            first = shapes.setdefault(setting.dependency_group_id, planned)
            other = first.granularity.block_shape(first.shape)
            if other != own:
                raise ConfigError(
                    f"dependency_group_id {setting.dependency_group_id!r}: {first.target} has blocks "
                    f"{list(other)}, {planned.target} has {list(own)}"
                )
        if setting.global_group_id is not None and setting.sparse_threshold is None:
            first = ratios.setdefault(setting.global_group_id, planned)
            if first.setting.goal != setting.goal:
                raise ConfigError(
                    f"global_group_id {setting.global_group_id!r}: all targets need the same sparse_ratio, but "
                    f"{first.target} has {first.setting.goal:g} and {planned.target} {setting.goal:g}"
                )


def _check_sizes(planned: PlannedTarget) -> None:
    """Check keys that speak of whole channels."""
    setting = planned.setting
    given = {
        "axes": setting.axes is not None,
        "round_to": setting.round_to > 1,
        "minimum": setting.minimum > 0,
    }
    for key, is_given in given.items():
        if is_given and planned.granularity.kind != "channel":
            raise ConfigError(
                f"{planned.target}: {key} counts whole channels, but the granularity is "
                f"{setting.granularity!r}; use 'out_channel' or 'in_channel'"
            )
    if setting.round_to > 1 and setting.internal_metric_block is not None:
        raise ConfigError(f"{planned.target}: round_to and internal_metric_block exclude each other")
