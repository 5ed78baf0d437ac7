"""Dynamic sparse training: sparse from the first step, with connections that are dropped and grown.

Evci et al., "Rigging the Lottery: Making All Tickets Winners" (https://arxiv.org/abs/1911.11134).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.pruning.base import block_norm
from dwindle.pruning.plan import PlannedTarget, with_ratios
from dwindle.pruning.sparsity import share_of, smallest
from dwindle.pruning.trained import TrainingPruner, whole_number
from dwindle.training.processes import sum_over_processes

__all__ = ["RecordingMask", "RigLPruner", "erdos_renyi_kernel", "moved_share", "regrown"]


def erdos_renyi_kernel(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Return the density of each layer (the paper's ERK): in proportion to the sum over the product of its sizes.

    Layers that would be more than dense are dense, and the others share what is left.

    Args:
        shapes: Shapes of the weights.
        density: Share of all weights together that stays, between 0 and 1.

    Returns:
        One density for each shape; weighted by the numbers of weights their mean is ``density``.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[layer] for layer in dense)
        open_layers = [layer for layer in range(len(sizes)) if layer not in dense]
        share = sum(raw[layer] * sizes[layer] for layer in open_layers)
        factor = budget / share if open_layers else 0.0
        full = {layer for layer in open_layers if raw[layer] * factor > 1}
        if not full:
            return [1.0 if layer in dense else raw[layer] * factor for layer in range(len(sizes))]
        dense |= full


def moved_share(step: int, end: int, first: float) -> float:
    """Return which share of the connections moves: ``first / 2 * (1 + cos(pi * step / end))``, 0 from ``end`` on."""
    return first / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def regrown(magnitude: Tensor, gradient: Tensor, active: Tensor, count: int) -> Tensor:
    """Return which connections are active after ``count`` of them were dropped and as many grown.

    Those with the smallest magnitude are dropped; then, of all that are not active now (the dropped ones
    included), those with the largest gradient are grown.

    Args:
        magnitude: Of each connection's weight.
        gradient: Magnitude of the gradient of each connection, active or not; ``-inf`` is grown last.
        active: Which are active, boolean.
        count: How many move; at most the number of active ones and of inactive ones.

    Returns:
        A boolean tensor with as many active connections as before.
    """
    infinite = torch.full_like(magnitude, torch.inf)
    dropped = smallest(torch.where(active, magnitude, infinite), count)
    kept = active & ~dropped
    grown = smallest(torch.where(kept, torch.full_like(gradient, torch.inf), -gradient), count)
    return kept | grown


class RecordingMask(simulate.MaskSimulator):
    """A mask that, when told to, keeps the gradient of the masked tensor, masked entries included.

    Attributes:
        recording: Whether it keeps the gradient of the backward passes to come.
        gradient: The sum of what it kept; None when it kept nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.recording = False
        self.gradient: Tensor | None = None

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the masked tensor, of the same shape and dtype."""
        masked = super().forward(tensor)
        if self.recording and self.training and masked.requires_grad:
            masked.register_hook(self._see)
        return masked

    def _see(self, gradient: Tensor) -> None:
        own = gradient.detach().float()
        self.gradient = own.clone() if self.gradient is None else self.gradient + own


class RigLPruner(TrainingPruner):
    """The model is as sparse as asked from the first step; weak connections are replaced by promising ones.

    After every ``interval_steps`` steps, up to ``end_share`` of ``training_steps``, a share of the active weights of
    each target with the smallest magnitude is dropped and as many weights with the largest gradient are grown, from
    zero. The share falls from ``first_share`` to 0 along a cosine. Gradients of inactive weights are kept for the
    one step before an update only; over all processes they are summed.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`; single weights, or blocks, with ratios.
        training_steps: Optimizer steps until the masks stand.
        interval_steps: Optimizer steps between two updates (the paper's delta T).
        first_share: Share of the active weights that moves at first (the paper's alpha).
        end_share: Share of ``training_steps`` after which nothing moves any more.
        distribution: ``"erk"`` gives each target its own ratio, by the paper's Erdos-Renyi-Kernel rule, with the
            ratio of the config_list (the same for all targets) over all of them; ``"config"`` takes it for each.
        start: ``"random"`` connections, as in the paper, or those with the largest ``"magnitude"``, for a model that
            is trained already.
        seed: Of the random connections; the same in all processes of a run.

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = None
    first_progress = 1.0
    works_sharded = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        training_steps: int,
        interval_steps: int = 100,
        first_share: float = 0.3,
        end_share: float = 0.75,
        distribution: Literal["erk", "config"] = "erk",
        start: Literal["random", "magnitude"] = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(model, config_list, training_steps=training_steps)
        self.interval_steps = whole_number("interval_steps", interval_steps, at_least=1)
        for name, value in {"first_share": first_share, "end_share": end_share}.items():
            if not 0 < value <= 1:
                raise ConfigError(f"{name}: {value!r} is not a share between 0 and 1")
        for name, given, choices in (
            ("distribution", distribution, ("erk", "config")),
            ("start", start, ("random", "magnitude")),
        ):
            if given not in choices:
                hint = did_you_mean(str(given), choices)
                raise ConfigError(f"{name}: {given!r} is not one of {', '.join(choices)}{hint}")
        self.first_share, self.start = first_share, start
        self.end_step = max(1, int(training_steps * end_share))
        self.seed = whole_number("seed", seed)
        self._next: dict[Target, Tensor] = {}
        if distribution == "erk":
            self.plan = with_ratios(self.plan, _erk_ratios(self.plan.goals))

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse what has no free connections: channels and N:M patterns, and thresholds.

        Raises:
            ConfigError: Saying why.
        """
        setting = self.plan.goals[target].setting
        if granularity.kind not in ("element", "blocks"):
            raise ConfigError(
                f"{target}: RigL moves single weights or blocks, not {setting.granularity!r}; leave the granularity "
                "out or give a block like [4, 4]"
            )
        if setting.sparse_ratio is None or setting.global_group_id is not None:
            raise ConfigError(
                f"{target}: RigL needs a sparse_ratio for each target, without a global_group_id"
            )

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module:
        """Return a mask that can keep the gradient of inactive weights."""
        return RecordingMask(torch.ones((), dtype=weight.dtype, device=weight.device))

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return what the masks are made of: 1 for active blocks; at the start chance, or magnitude."""
        if target in self._next:
            return self._next[target].float()
        if self._compressed:
            return self.active(target).float()
        magnitude = block_norm(weight, granularity, 1)
        if self.start == "magnitude":
            return magnitude
        digest = hashlib.blake2b(f"{self.seed}/{target}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        return torch.rand(magnitude.shape, generator=generator).to(weight.device)

    def active(self, target: Target) -> Tensor:
        """Return which blocks of a target are active, a boolean tensor with one entry for each block."""
        planned = self.plan.goals[target]
        mask = self._masks()[target].value.expand(planned.shape)
        return planned.granularity.reduce(mask, "max") > 0

    def _masks(self) -> dict[Target, RecordingMask]:
        return {
            target: simulator
            for target, simulator in self.simulators.items()
            if isinstance(simulator, RecordingMask)
        }

    def compress(self, progress: float | None = None) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Begin: mask the model, and keep gradients when the first step is an update."""
        result = super().compress(progress)
        self._listen()
        return result

    def advance(self) -> None:
        """Drop and grow when it is time, and keep the gradients of the step before."""
        if self._masks_listen():
            self._update()
        self._listen()

    def freeze(self) -> None:
        """Nothing moves any more."""
        self._listen()

    def _masks_listen(self) -> bool:
        return any(mask.recording for mask in self._masks().values())

    def _listen(self) -> None:
        """Keep the gradients of the next step when an update follows it."""
        upcoming = self.steps + 1
        due = upcoming % self.interval_steps == 0 and upcoming < min(self.end_step, self.training_steps)
        for mask in self._masks().values():
            mask.recording = due and not self.finished
            mask.gradient = None

    def _update(self) -> None:
        gradients = self._gradients()
        share = moved_share(self.steps, self.end_step, self.first_share)
        modules = dict(self.model.named_modules())
        before: dict[Target, Tensor] = {}
        for target, gradient in gradients.items():
            planned = self.plan.goals[target]
            parameter = modules[target.module]._parameters[target.name]
            weight = None if parameter is None else simulate.whole(parameter)
            if weight is None or not bool(torch.isfinite(weight).all()):
                raise DwindleError(f"{target}: the weights are not finite")
            active = before[target] = self.active(target)
            count = min(int(share * int(torch.count_nonzero(active))), int(torch.count_nonzero(~active)))
            magnitude = block_norm(weight, planned.granularity, 1)
            grown = self._behind(target, planned.granularity.reduce(gradient.abs(), "sum"))
            self._next[target] = regrown(magnitude, grown, active, count)
        try:
            self._mask(1.0)
            for target, active in before.items():
                self._begin_at_zero(target, self._next[target] & ~active)
        finally:
            self._next.clear()

    def _gradients(self) -> dict[Target, Tensor]:
        """Return the gradients that were kept, over all processes; none when they are not finite (a skipped step)."""
        gradients = {}
        for target, mask in self._masks().items():
            shape, device = self.plan.goals[target].shape, mask.value.device
            gradients[target] = torch.zeros(shape, device=device) if mask.gradient is None else mask.gradient
        sum_over_processes(gradients.values())
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        return gradients if finite else {}

    def _begin_at_zero(self, target: Target, grown: Tensor) -> None:
        weight = dict(self.model.named_modules())[target.module]._parameters[target.name]
        if weight is not None:
            blocks = self.plan.goals[target].granularity
            value = simulate.whole(weight).masked_fill(blocks.expand(grown, weight.shape), 0)
            simulate.write_whole(weight, value)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._listen()


def _erk_ratios(goals: Mapping[Target, PlannedTarget]) -> dict[Target, float]:
    """Return ratios that give each target a whole number of blocks by the ERK rule, and together the config's ratio."""
    ratios = {planned.setting.goal for planned in goals.values()}
    if len(ratios) != 1:
        raise ConfigError(
            "distribution='erk' shares one sparse_ratio out among all targets, but the config_list has several; give "
            "one, or distribution='config'"
        )
    ratio = ratios.pop() or 0.0
    densities = erdos_renyi_kernel([planned.shape for planned in goals.values()], 1 - ratio)
    counts = [planned.granularity.block_count(planned.shape) for planned in goals.values()]
    exact = [own * count for own, count in zip(densities, counts, strict=True)]
    gone = [count - int(kept) for kept, count in zip(exact, counts, strict=True)]
    if len({planned.block_size for planned in goals.values()}) == 1:
        # whole blocks: those that were rounded down most get the blocks that are missing
        missing = sum(gone) - share_of(sum(counts), ratio)
        order = sorted(range(len(gone)), key=lambda layer: int(exact[layer]) - exact[layer])
        for layer in order[: max(missing, 0)]:
            gone[layer] -= 1
    return {
        target: min((own + 0.5) / count, 1.0) if own else 0.0
        for target, own, count in zip(goals, gone, counts, strict=True)
    }
