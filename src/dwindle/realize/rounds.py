"""Pruning in rounds: prune, train, prune again, with real shrinking between the rounds or not; lottery tickets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.graph.modes import modes_kept
from dwindle.pruning import LevelPruner, Pruner
from dwindle.pruning.plan import PlannedTarget, PruningPlan, with_ratios
from dwindle.realize.from_masks import realize
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.surgery import sliced
from dwindle.training.compressor import Compressor
from dwindle.training.rewinding import Rewinding
from dwindle.training.schedule import CubicSchedule, ExponentialSchedule, LinearSchedule

#: The ratio of a target after a round: ``f(goal, round, rounds)``, rounds counted from 1.
RoundSchedule = Callable[[float, int, int], float]
_SCHEDULES: dict[str, RoundSchedule] = {
    "linear": lambda goal, number, rounds: LinearSchedule(0.0, goal, rounds)(number),
    "agp": lambda goal, number, rounds: CubicSchedule(0.0, goal, rounds)(number),
    "geometric": lambda goal, number, rounds: ExponentialSchedule(0.0, goal, rounds)(number),
}


@dataclass(frozen=True)
class Round:
    """One round, as the training function sees it.

    Attributes:
        number: 1 to ``rounds``; 0 is the training of the whole model before the first pruning.
        rounds: How many there are.
        compressors: To be given to the training run (``fit(..., compressors=round.compressors)``).
        first_step: The step that the training begins at: 0, or that of the rewinding.
    """

    number: int
    rounds: int
    compressors: tuple[Compressor, ...] = ()
    first_step: int = 0


@dataclass
class RoundRecord:
    """What one round gave.

    Attributes:
        number: From 1.
        sparsity: Share of the weights of the ranked parameters, as they were before the first round, that is gone
            or masked.
        parameters: Number of elements of the model's parameters.
        metric: What ``evaluate`` gave after the round's training, or None.
        shrink: What was cut and proven in this round, or None.
    """

    number: int
    sparsity: float
    parameters: int
    metric: float | None = None
    shrink: ShrinkResult | None = None


@dataclass
class RoundsResult:
    """All rounds.

    Attributes:
        model: The model: the user's own, masked, or (with ``shrink``) small.
        history: One record a round.
    """

    model: nn.Module
    history: list[RoundRecord] = field(default_factory=list)

    @property
    def masks(self) -> dict[str, dict[str, torch.Tensor]]:
        """The masks that lie on the model, ``{module: {target: mask}}``."""
        return simulate.masks_as_nested(self.model)

    @property
    def metric(self) -> float | None:
        """The metric after the last round."""
        return self.history[-1].metric if self.history else None


def prune_in_rounds(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    pruner: Callable[..., Pruner] = LevelPruner,
    *,
    rounds: int,
    train: Callable[[nn.Module, Round], Any],
    schedule: Literal["linear", "agp", "geometric"] | RoundSchedule = "linear",
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    sparsify: Callable[[nn.Module, Pruner, Round], Any] | None = None,
    shrink: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    rewinding: Rewinding | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> RoundsResult:
    """Prune a little, train, and prune again, until the ratios of the config are reached.

    What is gone in one round stays gone. Each round makes a new pruner for the model as it is; ratios count what the
    model had before the first round.

    Args:
        model: Changed in place.
        config_list: The goals, as for every pruner, with ``sparse_ratio``.
        pruner: The class of the pruner, or any function that makes one from model, config_list and options.
        rounds: How many.
        train: ``train(model, round)``, called after each pruning with the masked or small model.
        schedule: The ratio after each round: ``"linear"`` (``goal * i / n``), ``"agp"``
            (``goal * (1 - (1 - i / n)**3)``), ``"geometric"`` (``1 - (1 - goal)**(i / n)``: each round takes the same
            share of what is left), or a function of goal, round and rounds.
        example_inputs: Given to the pruner; needed for ``shrink``.
        example_kwargs: Keyword inputs.
        options: More arguments of the pruner, such as ``data``.
        sparsify: For pruners whose masks come from a training of their own: ``sparsify(model, pruner, round)`` runs it,
            for example ``fit(model, ..., compressors=[pruner])``. Without it ``pruner.compress()`` is called.
        shrink: Cut what is masked out of the model in each round, with proof. What cannot be cut stays masked.
        optimizer: With ``shrink``, the live optimizer that goes on with the small model.
        rewinding: Its state is put back after each pruning, before the training.
        evaluate: Gives a metric of the model after each round's training.

    Returns:
        The model and the history. Masks stay on the model.

    Raises:
        ConfigError: An argument is not valid; the model was not touched.
        RealizeError: A cut was not proven equal; the model stays as masked by this round.
    """
    _check_rounds(rounds)
    ratio_after = _SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    if ratio_after is None:
        raise ConfigError(f"schedule must be one of {', '.join(_SCHEDULES)} or a function, got {schedule!r}")
    if shrink and example_inputs is None and not example_kwargs:
        raise ConfigError("shrink=True needs example_inputs")

    def make() -> Pruner:
        given = dict(options or {})
        if example_inputs is not None or example_kwargs:
            given |= {"example_inputs": example_inputs, "example_kwargs": example_kwargs}
        return pruner(model, config_list, **given)

    own = make()
    goals = _Goals(own.plan, ratio_after, rounds)
    result = RoundsResult(model)
    for number in range(1, rounds + 1):
        if number > 1:
            own = make()
        own.plan = with_ratios(own.plan, *goals.relative(own.plan, number))
        at = Round(number, rounds)
        _make_masks(model, own, at, sparsify)
        cut = _cut(model, example_inputs, example_kwargs, optimizer) if shrink else None
        start = 0
        if rewinding is not None:
            if cut is not None:
                rewinding.follow(cut.plan.keep)
            start = rewinding.restore()
        train(model, Round(number, rounds, () if rewinding is None else (rewinding,), start))
        record = RoundRecord(number, goals.sparsity(model), _count(model), shrink=cut)
        record.metric = None if evaluate is None else _evaluated(model, evaluate)
        result.history.append(record)
    return result


def lottery_ticket(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    pruner: Callable[..., Pruner] = LevelPruner,
    *,
    rounds: int,
    train: Callable[[nn.Module, Round], Any],
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate_schedule: Any | None = None,
    rewind_step: int = 0,
    **arguments: Any,
) -> RoundsResult:
    """Find a winning ticket: train, prune, put weights, optimizer and schedule back to an early step, train again.

    Each round removes the same share of what is left. Frankle and Carbin, "The lottery ticket hypothesis"
    (https://arxiv.org/abs/1803.03635); rewinding to a later step than 0: https://arxiv.org/abs/1912.05671.

    Args:
        model: Changed in place; untrained at the beginning (or trained up to where it is to be rewound).
        config_list: As in :func:`prune_in_rounds`.
        pruner: As in :func:`prune_in_rounds`.
        rounds: How many prunings.
        train: ``train(model, round)``: first for the whole model (``round.number`` is 0), then for each ticket. It
            gives ``round.compressors`` to the training run and begins at ``round.first_step``.
        optimizer: Its state is rewound too.
        learning_rate_schedule: A learning rate scheduler, rewound too.
        rewind_step: The optimizer step to go back to.
        arguments: More of :func:`prune_in_rounds`; ``schedule`` is ``"geometric"`` unless given.

    Returns:
        As :func:`prune_in_rounds`: the last ticket, trained, with its masks.

    Raises:
        ConfigError: An argument is not valid; the model was not touched.
        DwindleError: The first training never came to ``rewind_step``.
    """
    _check_rounds(rounds)
    rewinding = Rewinding(model, optimizer, learning_rate_schedule, step=rewind_step)
    train(model, Round(0, rounds, (rewinding,)))
    arguments = {"schedule": "geometric", "optimizer": optimizer, **arguments}
    return prune_in_rounds(
        model, config_list, pruner, rounds=rounds, train=train, rewinding=rewinding, **arguments
    )


class _Goals:
    """What the first plan asked for, counted in blocks of the whole model."""

    def __init__(self, plan: PruningPlan, ratio_after: RoundSchedule, rounds: int) -> None:
        for planned in plan.goals.values():
            if planned.setting.sparse_ratio is None or planned.granularity.kind == "pattern":
                raise ConfigError(
                    f"{planned.target}: rounds need a sparse_ratio; a threshold or an N:M pattern can grow under "
                    "a ScheduledPruner"
                )
        self.goals = dict(plan.goals)
        self.ratios = {
            target: [ratio_after(_ratio(planned), number, rounds) for number in range(1, rounds + 1)]
            for target, planned in plan.goals.items()
        }
        for target, ratios in self.ratios.items():
            if not all(0 <= ratio <= 1 for ratio in ratios) or sorted(ratios) != ratios:
                raise ConfigError(
                    f"{target}: the ratios of the rounds must rise between 0 and 1, got {ratios}"
                )

    def relative(
        self, plan: PruningPlan, number: int
    ) -> tuple[dict[Target, float], dict[Target, dict[str, float]]]:
        """Return ratios and bounds for the model as it is, so that those of round ``number`` are met."""
        left = self._left_in_groups(plan)
        ratios: dict[Target, float] = {}
        bounds: dict[Target, dict[str, float]] = {}
        for target, planned in plan.goals.items():
            whole, now = _blocks(self.goals[target]), _blocks(planned)
            goal = self.ratios[target][number - 1]
            group = planned.setting.global_group_id
            if group is not None:
                ratios[target] = max(0.0, 1.0 - (1.0 - goal) / left[group])
            else:
                ratios[target] = _share(int(whole * goal + 1e-9) - (whole - now), now)
            given = {key: getattr(planned.setting, key) for key in ("min_sparse_ratio", "max_sparse_ratio")}
            bounds[target] = {
                key: min(max((whole * value - (whole - now)) / now, 0.0), 1.0)
                for key, value in given.items()
                if value is not None
            }
        return ratios, bounds

    def _left_in_groups(self, plan: PruningPlan) -> dict[int | str, float]:
        """Return for each global group the share of its blocks that is still there, weighed by their first sizes."""
        left: dict[int | str, list[int]] = {}
        for target, planned in self.goals.items():
            group = planned.setting.global_group_id
            if group is not None:
                counts = left.setdefault(group, [0, 0])
                counts[0] += _blocks(plan.goals[target]) * planned.block_size
                counts[1] += _blocks(planned) * planned.block_size
        return {group: now / whole for group, (now, whole) in left.items()}

    def sparsity(self, model: nn.Module) -> float:
        """Return the share of the weights of the first model's ranked parameters that is gone or masked."""
        masks = simulate.get_masks(model)
        modules = dict(model.named_modules())
        whole = alive = 0
        for target, planned in self.goals.items():
            whole += _blocks(planned) * planned.block_size
            parameter = modules[target.module]._parameters[target.name]
            if parameter is not None:
                alive += int((masks[target] != 0).sum()) if target in masks else parameter.numel()
        return 1.0 - alive / max(whole, 1)


def _ratio(planned: PlannedTarget) -> float:
    return planned.setting.sparse_ratio or 0.0


def _blocks(planned: PlannedTarget) -> int:
    return planned.granularity.block_count(planned.shape)


def _share(count: int, blocks: int) -> float:
    """Return the ratio at which exactly ``count`` of the blocks go, whatever the rounding."""
    return min(max((count + 1e-6) / max(blocks, 1), 0.0), 1.0) if count > 0 else 0.0


def _make_masks(
    model: nn.Module,
    pruner: Pruner,
    at: Round,
    sparsify: Callable[[nn.Module, Pruner, Round], Any] | None,
) -> None:
    if sparsify is None:
        pruner.compress()
        return
    sparsify(model, pruner, at)
    pruner.mask_again()  # a run takes the masks off and leaves zeros


def _cut(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer | None,
) -> ShrinkResult:
    """Cut what is masked, in place; parameters of which not all could be cut are masked again."""
    masks = {
        target: mask.clone() for target, mask in simulate.get_masks(model).items() if target.is_parameter
    }
    inputs = () if example_inputs is None else example_inputs
    result = realize(model, inputs, example_kwargs=example_kwargs, optimizer=optimizer, rewrite=False)
    left = []
    for target, mask in masks.items():
        small = sliced(mask, result.plan.keep.get(target.path, {}))
        if bool((small == 0).any()):
            left.append((target, small, "mul", None))
    simulate.attach_masks(model, left)
    return result


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    with modes_kept(model), torch.no_grad():
        model.eval()
        return float(evaluate(model))


def _check_rounds(rounds: int) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds must be a positive number, got {rounds!r}")
