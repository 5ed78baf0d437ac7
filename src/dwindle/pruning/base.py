"""The way of every pruner: collect weights, measure them, choose, mask.

A pruner differs from another in :meth:`Pruner.metric` alone; everything else stands in pure functions
(:mod:`~dwindle.pruning.groups`, :mod:`~dwindle.pruning.sparsity`, :mod:`~dwindle.pruning.masks`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target, excluded_modules
from dwindle.config.errors import ConfigError
from dwindle.pruning.coupling import Coupling
from dwindle.pruning.groups import selected, unit_counts, unit_sets
from dwindle.pruning.masks import follow_alignments, follow_axes, mask_axis, masks_of_goals, tie
from dwindle.pruning.plan import make_plan
from dwindle.pruning.report import PruningReport, SparsityRow
from dwindle.training.claims import Claim


class Pruner:
    """Base of all pruners.

    Args:
        model: The model. The constructor only reads it; :meth:`compress` attaches masks to it in place.
        config_list: Entries as in :mod:`dwindle.config`.
        example_inputs: A tensor or a tuple of positional inputs. With them the model is analysed: channels that
            belong together (residual branches, depthwise convolutions, heads) get one mask from the mean of
            their metrics, norms and biases of masked channels are masked with them, and channels that must stay
            (the model's outputs) stay. Without them every target stands alone, unless the config groups it.
        example_kwargs: Keyword inputs.

    Raises:
        ConfigError: The config_list does not fit the model, or this pruner.
    """

    #: What ``granularity: "default"`` means.
    default_granularity: str | None = "out_channel"
    #: Whether it can work on a model that ``fully_shard`` has cut up.
    works_sharded: bool = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.plan = make_plan(model, config_list, self.default_granularity)
        for planned in self.plan.goals.values():
            self.check(planned.target, planned.granularity)
        self._excluded = excluded_modules(model, config_list, "pruning")
        self._inputs: tuple[Any, ...] | None = None
        if example_inputs is not None or example_kwargs is not None:
            given = () if example_inputs is None else example_inputs
            self._inputs = tuple(given) if isinstance(given, tuple | list) else (given,)
        kinds = next((own.target for own in self.plan.goals.values() if own.setting.axes is not None), None)
        if kinds is not None and self._inputs is None:
            raise ConfigError(f"{kinds}: axes needs example_inputs, from which the kinds of axes are found")
        self._kwargs = dict(example_kwargs or {})
        self._coupling: Coupling | None = None
        self._before: dict[Target, Tensor] = {}
        self._attached: tuple[Target, ...] = ()
        self._taken_off: dict[Target, nn.Module] = {}
        self._prepared = False
        self._compressed = False
        self._progress = 0.0
        self._report: PruningReport | None = None

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse a target that this pruner cannot rank.

        Raises:
            ConfigError: Saying why.
        """

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the importance of each block of a parameter; what is smallest goes first.

        Args:
            target: The parameter.
            weight: Its value as the model uses it, without gradient.
            granularity: Its blocks.

        Returns:
            A tensor of ``granularity.block_shape(weight.shape)``.
        """
        raise NotImplementedError

    def compress(self, progress: float = 1.0) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Mask the model in place.

        Args:
            progress: Ratios are multiplied by it; schedules begin below 1 and go on with :meth:`update`.

        Returns:
            The model and its masks, ``{module: {target: mask}}``.

        Raises:
            ConfigError: It was called before, or ``progress`` is not between 0 and 1.
            CaptureError: The model fails on the example inputs; it was not touched.
        """
        if self._compressed:
            raise ConfigError("compress() was called before; make a new pruner for another round")
        check_progress(progress)
        self.prepare()
        self._mask(progress)
        self._compressed = True
        return self.model, self.masks

    def prepare(self) -> None:
        """Do what must be done before the first masks: analyse the model, and see what is masked already."""
        if simulate.has_shards(self.model):
            problem = self.sharding_problem()
            if problem is not None:
                raise ConfigError(
                    f"{type(self).__name__} cannot work on a model that fully_shard has cut up: {problem}"
                )
            simulate.reshard(self.model)
        if self._inputs is not None:
            self._coupling = Coupling(self.model, self._analyse(), self._excluded)
        self._before = simulate.get_masks(self.model)
        self._prepared = True

    def update(self, progress: float) -> None:
        """Measure again and renew the masks, with ratios scaled by ``progress`` (for schedules).

        Args:
            progress: 0 masks nothing, 1 is the goal of the config_list.

        Raises:
            ConfigError: ``compress()`` was not called, or the number is not between 0 and 1.
        """
        if not self._compressed:
            raise ConfigError("update() renews masks; call compress() first")
        check_progress(progress)
        self._mask(progress)

    def _analyse(self) -> Any:
        from dwindle.graph import analyse

        with simulate.disabled(self.model):
            return analyse(simulate.gathered(self.model), self._inputs or (), self._kwargs)

    def _mask(self, progress: float) -> None:
        """Compute all masks, then attach them: a failure leaves the model as it was."""
        goals = self.plan.goals
        modules = dict(self.model.named_modules())
        metrics = {
            target: self._behind(target, self.metric(target, weight, goals[target].granularity))
            for target, weight in self.collect().items()
        }
        sets, notes = unit_sets(goals, metrics, progress=progress, coupling=self._coupling)
        keep, axes = selected(sets, goals, metrics, progress=progress, coupling=self._coupling)
        masks = masks_of_goals(self.plan, keep)
        followed = follow_axes(masks, self._coupling, axes) if self._coupling is not None else {}
        followed |= follow_alignments(masks, self.plan.settings, modules)
        followed |= tie(masks, self.model)
        order = {name: position for position, name in enumerate(modules)}
        masks = dict(sorted(masks.items(), key=lambda item: order[item[0].module]))
        simulate.attach_masks(self.model, self._attachable(masks, modules))
        self._attached = tuple(masks)
        self._progress = progress
        self._report = self._describe(masks, followed, notes, progress, unit_counts(sets))
        if progress == 1:
            self._warn_of_misses()

    def _behind(self, target: Target, metric: Tensor) -> Tensor:
        """Rank blocks that were masked before this pruner behind all others: what is gone goes first."""
        before = self._before.get(target)
        if before is None:
            return metric
        gone = self.plan.goals[target].granularity.reduce(before.float(), "sum") == 0
        return metric.masked_fill(gone.to(metric.device), float("-inf"))

    def _attachable(
        self, masks: Mapping[Target, Tensor], modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Target, Tensor, str, int | None]]:
        """Yield each mask as it is attached: with what was masked before, its method and its axis."""
        for target, mask in masks.items():
            before = self._before.get(target)
            whole = mask if before is None else mask.to(before.device) * before
            setting = self.plan.settings.get(target)
            method = setting.apply_method if setting is not None else "mul"
            yield target, whole, method, mask_axis(target, modules[target.module], whole)

    def collect(self) -> dict[Target, Tensor]:
        """Return the values of the ranked parameters, as the model uses them before this pruner."""
        modules = dict(self.model.named_modules())
        values = {}
        for target in self.plan.goals:
            parameter = modules[target.module]._parameters[target.name]
            if parameter is None:
                raise ConfigError(f"{target} is no longer there")
            value = simulate.whole(parameter)
            if target in self._before:
                value = value * self._before[target].to(value)
            values[target] = value
        return values

    def _describe(
        self,
        masks: Mapping[Target, Tensor],
        followed: Mapping[Target, str],
        notes: list[str],
        progress: float,
        units: Mapping[Target, int],
    ) -> PruningReport:
        rows = []
        for target, mask in masks.items():
            planned = self.plan.goals.get(target)
            requested = None
            if planned is not None and planned.setting.goal is not None:
                alone = planned.setting.global_group_id is None
                requested = planned.setting.goal * progress if alone else None
            gone = mask.numel() - int(torch.count_nonzero(mask))
            share = gone / max(mask.numel(), 1)
            follows = None if planned is not None else followed.get(target)
            rows.append(SparsityRow(str(target), requested, share, units.get(target, mask.numel()), follows))
        return PruningReport(tuple(rows), tuple(notes))

    def _warn_of_misses(self) -> None:
        report = self.report()
        if not report.missed:
            return
        listed = ", ".join(
            f"{row.target} {row.achieved:.0%} of {row.requested:.0%}" for row in report.missed[:4]
        )
        more = f" and {len(report.missed) - 4} more" if len(report.missed) > 4 else ""
        reasons = "; ".join(report.notes[:3])
        warnings.warn(
            f"less was pruned than asked: {listed}{more}{'; ' + reasons if reasons else ''} (see report())",
            stacklevel=4,
        )

    def report(self) -> PruningReport:
        """Return what was asked and what was done.

        Raises:
            ConfigError: ``compress()`` was not called.
        """
        if self._report is None:
            raise ConfigError("there is nothing to report before compress()")
        return self._report

    @property
    def masks(self) -> dict[str, dict[str, Tensor]]:
        """The masks of the model, ``{module: {target: mask}}``."""
        return simulate.masks_as_nested(self.model)

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up; None where it can, or is done."""
        if self.works_sharded or self._stands:
            return None
        return "it computes with the weights themselves; prune before fully_shard"

    @property
    def _stands(self) -> bool:
        """Whether the masks are made and will not change."""
        return self._compressed and self._progress == 1

    def step(self) -> None:
        """The optimizer has made one step; masks that do not change need nothing."""

    def loss(self) -> Tensor | float:
        """What to add to the loss: nothing."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pruner's own trainable parameters: none."""
        yield from ()

    def claims(self) -> Iterator[Claim]:
        """Yield the targets that get a goal of their own."""
        for target, planned in self.plan.goals.items():
            yield Claim(target, "mask", whole=planned.granularity.whole_channels)

    def status(self) -> dict[str, float]:
        """Return ``sparsity``, the share of the pruner's targets that is masked, and ``progress`` towards its goal."""
        masks = simulate.get_masks(self.model)
        gone = total = 0.0
        for target, planned in self.plan.goals.items():
            elements = math.prod(planned.shape)
            total += elements
            if target in masks:
                gone += elements * (1.0 - float(masks[target].double().mean()))
        return {"sparsity": gone / total if total else 0.0, "progress": self._progress}

    def attach(self) -> None:
        """Mask the model if it is not masked yet (:func:`dwindle.training.compress` calls this)."""
        if not self._compressed:
            self.compress()
        elif not self._attached:
            if not self._prepared:  # its state was loaded before it saw the model
                self.prepare()
            self._mask(self._progress)

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Take this pruner's masks off, leaving masked weights at zero (or, with False, as they were)."""
        own = [*self._attached]
        simulators = simulate.simulated_targets(self.model, "mask")
        self._taken_off = {target: simulators[target] for target in own if target in simulators}
        self._attached = ()
        return simulate.detach(self.model, keep_values=keep_values, targets=own, stage="mask")

    def mask_again(self) -> None:
        """Put the masks that :meth:`detach` took off back on what carries none now, as they were (for fine-tuning)."""
        there = simulate.get_masks(self.model)
        simulate.attach_masks(
            self.model,
            [
                (target, own.value, own.apply_method, own.axis)
                for target, own in self._taken_off.items()
                if target not in there and isinstance(own, simulate.MaskSimulator)
            ],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on; the masks themselves are in the model's own state."""
        masked = {str(target): simulate.simulator_of(self.model, target, "mask") for target in self._attached}
        places = {
            path: [simulator.apply_method, simulator.axis]
            for path, simulator in masked.items()
            if isinstance(simulator, simulate.MaskSimulator)
        }
        return {"compressed": self._compressed, "progress": self._progress, "masked": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        A pruner that works on its model already gets masks where the saved one had them, all ones until the
        model's own state is loaded, and loses its masks elsewhere.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"compressed", "progress", "masked"} - set(state)
        if missing:
            raise ConfigError(f"the state of a pruner needs {', '.join(sorted(missing))}")
        if self._compressed:
            places = {Target.parse(path): own for path, own in state["masked"].items()}
            self._unmask([target for target in self._attached if target not in places])
            for target, (method, axis) in places.items():
                if target not in self._attached:
                    ones = None if axis is None else torch.ones(1)
                    simulate.attach_mask(self.model, target, ones, apply_method=method, axis=axis)
            self._attached = tuple(places)
        self._compressed, self._progress = bool(state["compressed"]), float(state["progress"])

    def _unmask(self, targets: list[Target]) -> None:
        """Take this pruner's masks off targets; what was masked before it stays masked."""
        if not targets:
            return
        simulators = simulate.simulated_targets(self.model, "mask")
        simulate.detach(self.model, keep_values=False, targets=targets, stage="mask")
        for target in targets:
            own = simulators.get(target)
            if target in self._before and isinstance(own, simulate.MaskSimulator):
                simulate.attach_mask(
                    self.model, target, self._before[target], apply_method=own.apply_method, axis=own.axis
                )


def check_progress(progress: float) -> None:
    """Refuse a progress that is no share.

    Raises:
        ConfigError: Saying so.
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress {progress} is not between 0 and 1")


def block_norm(weight: Tensor, granularity: Granularity, order: int) -> Tensor:
    """Return the L1 or L2 norm of each block, computed in float32 at least."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return granularity.reduce(wide.abs(), "sum") if order == 1 else granularity.reduce(wide, "norm")
