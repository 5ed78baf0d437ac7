"""Wanda: small weights on quiet inputs go, and every output loses the same share of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.observation import ObservingPruner
from dwindle.training.linear_layers import (
    block_ids,
    from_matrix,
    input_of,
    is_linear_layer,
    sums_of_squares,
    to_matrix,
)


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Return ``|w_ij| * ||x_j||``, the score of Sun et al. (arXiv:2306.11695, equation 1).

    Args:
        weight: ``[..., rows, columns]``.
        squares: Sum (or mean: the order is the same) of the squares of each column's inputs, ``[..., columns]``.
    """
    return weight.abs() * squares.clamp(min=0).sqrt().unsqueeze(-2)


def ranks_in_rows(scores: Tensor) -> Tensor:
    """Return for each score its rank among the scores of its row (0 is the smallest; the earlier one wins a tie).

    A ranking of all ranks together takes equally many from every row, to one, whatever the number.

    Args:
        scores: ``[..., columns]``.
    """
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1).to(scores.dtype)


class WandaPruner(ObservingPruner):
    """Weights go whose absolute value times the norm of their input is smallest (Wanda, arXiv:2306.11695).

    The weights are compared within each output (the paper's choice: every row of the matrix loses the same share);
    with ``global_group_id``, ``dependency_group_id``, ``sparse_threshold`` or ``internal_metric_block`` in the config
    as that says. The weights that stay do not change. ``granularity: "2:4"`` keeps two of four neighbours; blocks
    and channels have the sum of the scores in them.

    Layers are Linear, convolutions and Hugging Face's Conv1D. Use it with ``data=`` (no labels needed), or in a
    training run as :class:`ObservingPruner` says. Only one number an input is kept, whatever the data's size.
    """

    works_sharded = False

    default_granularity = None

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse what is no weight of a linear layer.

        Raises:
            ConfigError: Saying why.
        """
        check_linear(self.model, target, type(self).__name__)

    def watch(self) -> Iterator[RemovableHandle]:
        """Add up the squares of the inputs of each layer."""
        modules = dict(self.model.named_modules())
        for target in self.plan.goals:
            yield modules[target.module].register_forward_pre_hook(self._observer(target), with_kwargs=True)

    def _observer(self, target: Target) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = input_of(args, kwargs)
            if value is not None:
                self.add(target, *sums_of_squares(module, value))

        return observe

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the scores of the blocks, or their ranks within each output where outputs are compared alone."""
        module = self.model.get_submodule(target.module)
        matrix = to_matrix(module, weight if weight.dtype.itemsize >= 4 else weight.float())
        scores = wanda_scores(matrix, self.mean(target).to(matrix))
        if not bool(torch.isfinite(scores).all()):
            raise DwindleError(f"{target}: its weights hold NaN or infinite values")
        blocks = granularity.reduce(from_matrix(module, scores, weight.shape), "sum")
        if granularity.kind not in ("element", "blocks") or not self._alone(target):
            return blocks
        if granularity.kind == "element":
            return from_matrix(module, ranks_in_rows(scores), weight.shape)
        return _ranked_blocks(blocks, block_ids(module, granularity, weight.shape))

    def _alone(self, target: Target) -> bool:
        setting = self.plan.goals[target].setting
        grouped = (setting.global_group_id, setting.dependency_group_id, setting.internal_metric_block)
        return setting.sparse_threshold is None and all(entry is None for entry in grouped)


def _ranked_blocks(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the rank of each block among those that lie in the same rows; the scores where rows have one block.

    Args:
        scores: One value for each block.
        ids: The block of each entry, ``[groups, rows, columns]``.
    """
    ranks = scores.new_full((scores.numel(),), -1.0)
    for matrix in ids:
        firsts = matrix[:, 0]
        rows = [int((firsts == first).nonzero()[0]) for first in firsts.unique()]
        for row in rows:
            own = matrix[row].unique()
            if own.numel() == 1 or bool((ranks[own] >= 0).any()):
                return scores  # whole rows, or blocks that cross groups: nothing to compare within
            ranks[own] = ranks_in_rows(scores.reshape(-1)[own])
    return ranks.reshape(scores.shape)


def check_linear(model: nn.Module, target: Target, pruner: str) -> None:
    """Refuse a target that is no weight of a linear layer.

    Raises:
        ConfigError: Saying so.
    """
    module = model.get_submodule(target.module)
    if target.name != "weight" or not is_linear_layer(module):
        raise ConfigError(
            f"{target}: {pruner} prunes the weights of Linear, Conv1d, Conv2d, Conv3d and Conv1D layers, not "
            f"{target.name!r} of a {type(module).__name__}; exclude it with exclude_op_names"
        )
