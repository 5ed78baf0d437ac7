"""How ranks are chosen for one layer: as said, by a share, by energy, by evidence; and what all choices cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.config.schema import FactorizationSetting
from dwindle.factorization.allocation import Choices
from dwindle.factorization.factors import lost_shares, matrices, spectra
from dwindle.factorization.forms import (
    LayerForm,
    Places,
    chain_elements,
    chain_macs,
    full_ranks,
    layer_macs,
    parts_of,
)
from dwindle.factorization.vbmf import evbmf_rank

__all__ = ["LayerProblem", "rank_by_energy", "rounded_up", "said_ranks"]


@dataclass(frozen=True)
class LayerProblem:
    """A layer whose ranks are to be chosen.

    Attributes:
        form: What it is.
        kernel: Its weight as ``[out, in, ...]``, in the precision of the work.
        method: How it is factorized.
        calls: Where it computes.
        covariance: Second moments of its columns on the data, or None.
    """

    form: LayerForm
    kernel: Tensor
    method: str
    calls: tuple[Places, ...]
    covariance: Tensor | None = None

    @property
    def full(self) -> tuple[int, ...]:
        """The ranks at which nothing is lost."""
        return full_ranks(self.method, self.form)

    def cost(self, ranks: Sequence[int], unit: str) -> float:
        """Return what the chain costs, in ``macs`` or ``params`` (or ``bytes``, which are as many)."""
        return float(self.expected_cost(ranks, unit))

    def expected_cost(self, ranks: Sequence[Any], unit: str) -> Any:
        """Return the same for ranks that are fractions, or tensors with gradients."""
        parts = parts_of(self.method, self.form, ranks)
        if unit == "macs":
            return chain_macs(parts, self.form, self.calls)
        return chain_elements(parts, self.form)

    def whole_cost(self, unit: str) -> float:
        """Return what the layer costs as it is."""
        return float(layer_macs(self.form, self.calls) if unit == "macs" else self.form.elements)

    def choices(self, unit: str, round_to: int, minimum: int) -> tuple[Choices, np.ndarray]:
        """Return every choice of ranks that is cheaper than the whole layer, and the whole layer as the last one.

        The loss is the share of the layer's energy (on the data, of its outputs' energy) that goes.

        Args:
            unit: Of the costs.
            round_to: Ranks are multiples of this (or full).
            minimum: No rank is smaller, unless it is full.

        Returns:
            The choices, and the ranks of all but the last one, ``[choices - 1, ranks]``.

        Raises:
            ConfigError: CP, whose loss is not known before it is done.
        """
        if self.method == "cp":
            raise ConfigError("what 'cp' loses at a rank is not known before; give rank= for these layers")
        lost = lost_shares(self.method, self.kernel, self.covariance).cpu().numpy()
        steps = [allowed_ranks(most, round_to, minimum) for most in self.full]
        columns = [grid.ravel() for grid in np.meshgrid(*steps, indexing="ij")]
        loss = lost[tuple(column - 1 for column in columns)]
        parts = parts_of(self.method, self.form, columns)
        cost = (
            chain_macs(parts, self.form, self.calls) if unit == "macs" else chain_elements(parts, self.form)
        )
        whole = self.whole_cost(unit)
        cheaper = np.flatnonzero(cost < whole)
        costs = np.append(cost[cheaper].astype(np.float64), whole)
        losses = np.append(loss[cheaper], 0.0)
        return Choices(costs, losses), np.stack(columns, axis=1)[cheaper]


def allowed_ranks(most: int, round_to: int, minimum: int) -> np.ndarray:
    """Return the multiples of ``round_to`` from ``minimum`` on, and the full rank."""
    first = max(1, -(-min(minimum, most) // round_to)) * round_to
    steps = np.arange(first, most + 1, round_to)
    return steps if len(steps) and steps[-1] == most else np.append(steps, most)


def rounded_up(rank: int, most: int, round_to: int, minimum: int) -> int:
    """Return the next multiple of ``round_to``, no smaller than ``minimum`` and no larger than the full rank."""
    return min(most, -(-max(rank, minimum) // round_to) * round_to)


def rank_by_energy(spectrum: Tensor, share: float) -> int:
    """Return the smallest rank that keeps a share of the energy.

    Args:
        spectrum: Squared singular values, largest first.
        share: From 0 to 1.
    """
    kept = spectrum.cumsum(0)
    if float(kept[-1]) <= 0:
        return 1
    enough = kept >= share * kept[-1] * (1 - 16 * torch.finfo(kept.dtype).eps)
    return int(enough.to(torch.int8).argmax()) + 1


def said_ranks(problem: LayerProblem, setting: FactorizationSetting) -> tuple[int, ...] | None:
    """Return the ranks that a setting gives; None when it leaves them to a target.

    Raises:
        ConfigError: A rank is above the full one, or the setting has no meaning for the method.
    """
    most, method = problem.full, problem.method
    if setting.rank is None and setting.rank_ratio is None and setting.energy is None:
        return None
    if isinstance(setting.rank, int | tuple):
        ranks = (setting.rank,) * len(most) if isinstance(setting.rank, int) else setting.rank
        if len(ranks) != len(most):
            raise ConfigError(f"rank {list(ranks)}: {method!r} takes {len(most)} of them")
        return tuple(
            min(rank, bound) if method != "cp" else rank for rank, bound in zip(ranks, most, strict=True)
        )
    if method == "cp":
        raise ConfigError("'cp' takes a number as rank: its error at a rank is not known before it is done")
    if setting.rank_ratio is not None:
        found = [int(bound * setting.rank_ratio + 0.5) for bound in most]
    elif setting.energy is not None:
        found = [
            rank_by_energy(own, setting.energy) for own in spectra(method, problem.kernel, problem.covariance)
        ]
    else:
        found = [evbmf_rank(matrix) for matrix in matrices(method, problem.kernel)]
    return tuple(
        rounded_up(rank, bound, setting.round_to, setting.minimum)
        for rank, bound in zip(found, most, strict=True)
    )
