"""SparseGPT: prunes layer after layer, and lets the weights that stay make up for those that go."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.base import Pruner, check_progress
from dwindle.pruning.brain_surgeon import Choice, free_blocks, reconstruct, reconstruction_error
from dwindle.pruning.masks import tied_targets
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.sparsity import share_of
from dwindle.pruning.wanda import check_linear
from dwindle.training.linear_layers import block_ids, from_matrix, input_of, sums_of_products, to_matrix
from dwindle.training.progress import tracked

_UNFIT = (
    "global_group_id",
    "dependency_group_id",
    "internal_metric_block",
    "sparse_threshold",
    "min_sparse_ratio",
    "max_sparse_ratio",
    "round_to",
    "minimum",
)


class _Seen(BaseException):
    """The inputs that are wanted have been seen: the rest of the forward is not needed."""


class SparseGPTPruner(ObservingPruner):
    """Weights go whose loss can best be made up for, and the others do (SparseGPT, arXiv:2301.00774).

    Layer after layer, in the order of the forward: the inputs are seen through the layers that are pruned already,
    each row is an Optimal Brain Surgeon problem on ``X X'`` of the layer's inputs, and the weights that stay are
    changed. Unlabelled data is enough, a few hundred samples; there is no gradient.

    Single weights by default; ``granularity: "2:4"`` keeps two of four neighbours; blocks such as ``[16, 16]`` and
    ``"in_channel"`` go as a whole. Layers are Linear, convolutions and Hugging Face's Conv1D.

    The matrices ``X X'`` of as many layers as fit in ``memory`` are summed up in one pass over the data; no activation
    is kept. With a smaller ``memory`` there are more passes, and later layers see more of what earlier ones lost.

    Args:
        model: As in :class:`Pruner`. :meth:`compress` also changes the weights that stay, in place.
        config_list: As in :class:`Pruner`, with ``sparse_ratio`` (or an N:M granularity) for each layer by itself.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        data: Batches of inputs, or one tensor; labels are ignored.
        batches: How many batches are used; None takes all.
        adapt: Applied to each batch first.
        damping: Share of the mean of the diagonal of ``X X'`` that is added to the diagonal.
        stripe: Columns among which is chosen at once.
        memory: Bytes that the matrices of one pass may take; one layer at least is done in a pass.

    Attributes:
        errors: For each target the share of the layer's output (its sum of squares) that was lost.

    Raises:
        ConfigError: The config asks for what this method cannot do, or an argument is not valid.
    """

    works_sharded = False

    default_granularity = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        data: Any,
        batches: int | None = None,
        adapt: Callable[[Any], Any] | None = None,
        damping: float = 0.01,
        stripe: int = 128,
        memory: int = 1 << 30,
    ) -> None:
        super().__init__(
            model, config_list, example_inputs, example_kwargs, data=data, batches=batches, adapt=adapt
        )
        if data is None:
            raise ConfigError("SparseGPTPruner needs data: batches of inputs")
        if damping <= 0 or stripe < 1 or memory < 1:
            raise ConfigError("damping, stripe and memory must be above 0")
        self.damping, self.stripe, self.memory = damping, stripe, memory
        self.errors: dict[Target, float] = {}
        self._kept: dict[Target, Tensor] = {}
        self._watched: list[Target] = []
        self._calls: dict[Target, int] | None = None

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse what cannot be made up for layer by layer.

        Raises:
            ConfigError: Saying why.
        """
        check_linear(self.model, target, type(self).__name__)
        planned = self.plan.goals[target]
        setting = planned.setting
        for key in ("global_group_id", "dependency_group_id", "internal_metric_block", "sparse_threshold"):
            if getattr(setting, key) is not None:
                raise ConfigError(
                    f"{target}: SparseGPTPruner prunes each layer by itself; {key} does not fit"
                )
        module = self.model.get_submodule(target.module)
        ids = block_ids(module, granularity, planned.shape)
        if ids.shape[2] > 1 and bool((ids == ids[:, :, :1]).all()):
            raise ConfigError(
                f"{target}: when a whole output goes nothing of it is left that could make up for it; take smaller "
                "blocks, 'in_channel', or another pruner"
            )
        if sum(matrix.unique().numel() for matrix in ids) > int(ids.max()) + 1:
            raise ConfigError(f"{target}: a block must not cross the groups of a convolution")
        shared = [other for other in tied_targets(self.model).get(target, ()) if other != target]
        if shared:
            raise ConfigError(
                f"{target} is also {shared[0]}, which its inputs say nothing of; exclude it with exclude_op_names"
            )

    def prepare(self) -> None:
        """Analyse the model; the data is looked at layer by layer."""
        Pruner.prepare(self)
        if self._coupling is not None and any(
            p.granularity.kind == "channel" for p in self.plan.goals.values()
        ):
            raise ConfigError(
                "SparseGPTPruner chooses input channels of each layer by itself; leave out example_inputs"
            )
        if self.data is not None and iter(self.data) is self.data:
            self.data = list(itertools.islice(self.data, self.batches_wanted))  # read several times

    def update(self, progress: float) -> None:
        """Prune on, from the weights as they are now, with ratios scaled by ``progress``.

        Raises:
            ConfigError: ``compress()`` was not called, or the number is not between 0 and 1.
        """
        Pruner.update(self, progress)

    def _mask(self, progress: float) -> None:
        """Choose and reconstruct layer after layer, then mask; after a failure all weights are as they were."""
        check_progress(progress)
        before: dict[Target, Tensor] = {}
        try:
            for group in self._groups():
                self._watched = group
                self.observe()
                self.statistics.reduce(self._device)
                self._check_finite()
                with torch.autocast(self._device.type, enabled=False):
                    for target in tracked(group, f"{type(self).__name__}: layers"):
                        self._prune(target, progress, before)
            Pruner._mask(self, progress)
        except BaseException:
            for target, weight in before.items():
                self._parameter(target).data.copy_(weight)
            raise
        finally:
            self._watched, self._calls = [], None
            self.statistics.clear()

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return 1 for each block that the reconstruction kept, 0 for those it removed."""
        return self._kept[target]

    def _parameter(self, target: Target) -> Tensor:
        parameter = self.model.get_submodule(target.module)._parameters[target.name]
        if parameter is None:
            raise ConfigError(f"{target} is no longer there")
        return parameter

    # The inputs.

    def _groups(self) -> Iterator[list[Target]]:
        """Yield the targets in the order of their calls, as many at once as fit in the memory."""
        sizes = {}
        for target, planned in self.plan.goals.items():
            matrix = to_matrix(
                self.model.get_submodule(target.module), torch.empty(planned.shape, device="meta")
            )
            sizes[target] = (
                matrix.shape[0] * matrix.shape[2] ** 2 * max(4, self._parameter(target).element_size())
            )
        if sum(sizes.values()) <= self.memory:
            yield list(sizes)
            return
        order = self._order()
        group: list[Target] = []
        for target in sorted(sizes, key=lambda target: order[target]):
            if group and sum(sizes[other] for other in group) + sizes[target] > self.memory:
                yield group
                group = []
            group.append(target)
        yield group

    def _order(self) -> dict[Target, int]:
        """Run one batch; return when each target was called first, and keep how often."""
        order: dict[Target, int] = {}
        calls: dict[Target, int] = {}

        def counter(target: Target) -> Any:
            def count(*_: Any) -> None:
                order.setdefault(target, len(order))
                calls[target] = calls.get(target, 0) + 1

            return count

        handles = [
            self.model.get_submodule(target.module).register_forward_pre_hook(counter(target))
            for target in self.plan.goals
        ]
        self._watched, self._calls = [], None
        try:
            wanted, self.batches_wanted = self.batches_wanted, 1
            self.observe()
        finally:
            self.batches_wanted = wanted
            for handle in handles:
                handle.remove()
        for target in self.plan.goals:
            if target not in order:
                self.mean(target)  # says that nothing was seen of it
        self._calls = calls
        return order

    def watch(self) -> Iterator[RemovableHandle]:
        """Add up ``X X'`` of the inputs of the layers of this pass."""
        left: dict[Target, int] = {}
        for target in self._watched:
            module = self.model.get_submodule(target.module)
            yield module.register_forward_pre_hook(self._observer(target, left), with_kwargs=True)

    def _observer(self, target: Target, left: dict[Target, int]) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = input_of(args, kwargs)
            if value is not None:
                self.add(target, *sums_of_products(module, value))
            if self._calls is None:
                return
            if not left:
                left.update({own: self._calls[own] for own in self._watched})
            left[target] -= 1
            if all(count <= 0 for count in left.values()):
                left.clear()
                raise _Seen

        return observe

    def forward(self, batch: Any) -> None:
        """Run the model on a batch, as far as it is needed."""
        with contextlib.suppress(_Seen):
            super().forward(batch)

    # One layer.

    def _prune(self, target: Target, progress: float, before: dict[Target, Tensor]) -> None:
        """Choose what goes from one layer and change its weights in place."""
        planned = self.plan.goals[target]
        module, parameter = self.model.get_submodule(target.module), self._parameter(target)
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise DwindleError(f"{target} holds NaN or infinite values")
        before[target] = parameter.detach().clone()
        kind = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        weight = to_matrix(module, parameter.detach().to(kind)).clone()
        mask = self._before.get(target, weight.new_ones(()))
        free = to_matrix(module, mask.to(weight).expand(planned.shape)) != 0
        weight *= free
        layer = _Layer(
            block_ids(module, planned.granularity, planned.shape).to(weight.device),
            planned.granularity,
            (planned.setting.goal or 0.0) * progress,
            progress,
        )
        hessians = self.mean(target).to(weight)
        kept = torch.ones_like(free)
        lost = []
        for group, (order, choice) in enumerate(layer.choices(free)):
            old, hessian = weight[group].clone(), hessians[group]
            new, stays = reconstruct(
                old[:, order],
                hessian[order][:, order],
                choice,
                damping=self.damping,
                stripe=self.stripe,
                allowed=free[group][:, order],
            )
            weight[group][:, order], kept[group][:, order] = new, stays
            lost.append(reconstruction_error(old, weight[group], hessian))
        self.errors[target] = sum(lost) / len(lost)
        del self.statistics.sums[target]  # the largest thing in memory, used up
        stays = from_matrix(module, kept.to(kind), planned.shape)
        self._kept[target] = (
            stays if planned.granularity.kind == "pattern" else planned.granularity.reduce(stays, "max")
        )
        parameter.data.copy_(from_matrix(module, weight, planned.shape))


@dataclass(frozen=True)
class _Layer:
    """What is asked of one layer.

    Attributes:
        ids: The block of each entry, ``[groups, rows, columns]``.
        granularity: What the blocks are.
        ratio: Share of the blocks that goes.
        progress: Share of an N:M pattern that goes.
    """

    ids: Tensor
    granularity: Granularity
    ratio: float
    progress: float

    def choices(self, free: Tensor) -> Iterator[tuple[Tensor, Choice]]:
        """Yield for each group of a convolution the order of columns in which blocks are neighbours, and what goes.

        What is zero for good goes first, as for every pruner; the rest is shared out by what each group may lose.

        Args:
            free: Which entries may be other than zero.
        """
        choices = [self._blocks(ids) for ids in self.ids]
        if self.granularity.kind == "pattern":
            yield from choices
            return
        possible = [
            int(free_blocks(own[:, order], choice).sum())
            for own, (order, choice) in zip(free, choices, strict=True)
        ]
        blocks = int(self.ids.max()) + 1
        removed = max(share_of(blocks, self.ratio) - (blocks - sum(possible)), 0)
        before = 0
        for (order, choice), own in zip(choices, possible, strict=True):
            share = removed * (before + own) // max(sum(possible), 1) - removed * before // max(
                sum(possible), 1
            )
            before += own
            yield order, replace(choice, removed=share)

    def _blocks(self, ids: Tensor) -> tuple[Tensor, Choice]:
        """Return the order of columns in which the blocks of a matrix are neighbours, and what they are."""
        _, column = ids[0].unique(return_inverse=True)
        order = column.argsort(stable=True)
        width = int((column == 0).sum())
        if self.granularity.kind == "pattern":
            goes = int((self.granularity.window - self.granularity.keep) * self.progress)
            return order, Choice(width, pattern=self.granularity.window - goes)
        _, row = ids[:, 0].unique(return_inverse=True)
        alone = int(row.max()) + 1 == len(row)
        return order, Choice(width, None if alone else row)
