"""What the ranks of several layers may cost together, and which directions go until they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.factorization.ranks import LayerProblem

__all__ = ["RankGoals"]


class RankGoals:
    """Layers with ranks of their own, and layers that share a budget.

    Args:
        problems: The layers, by path.
        said: Ranks that single layers shall have; the others share the budget.
        unit: ``"macs"`` or ``"params"``.

    Attributes:
        shared: Paths of the layers that share the budget.
        budget: What those may cost together, in the unit; None where nothing was asked of them.
    """

    def __init__(
        self, problems: Mapping[str, LayerProblem], said: Mapping[str, tuple[int, ...]], unit: str
    ) -> None:
        self.problems, self.said, self.unit = dict(problems), dict(said), unit
        self.shared = [name for name in self.problems if name not in self.said]
        self.budget: float | None = None

    def share_of(self, total: float, share: float) -> None:
        """Set the budget so that a share of a whole model stays.

        Args:
            total: Cost of the model with all layers whole.
            share: Of it that stays, 0 to 1.

        Raises:
            ConfigError: Chains of rank 1 would cost more.
        """
        whole = {name: self.whole(name) for name in self.problems}
        said = sum(min(self.cost(name, own), whole[name]) for name, own in self.said.items())
        budget = share * total - (total - sum(whole.values())) - said
        least = sum(
            min(self.cost(name, (1,) * len(self.problems[name].full)), whole[name]) for name in self.shared
        )
        if budget < least:
            raise ConfigError(
                f"target: {self.unit} = {share:g} cannot be reached; the layers that may change allow no less than "
                f"{share + (least - budget) / total:.3f}"
            )
        self.budget = budget

    def whole(self, name: str) -> float:
        """Return the cost of a layer that stays as it is."""
        return self.problems[name].whole_cost(self.unit)

    def cost(self, name: str, ranks: Sequence[int]) -> float:
        """Return the cost of a layer with these ranks."""
        return self.problems[name].cost(ranks, self.unit)

    def penalty(
        self,
        first: Mapping[str, Sequence[float]],
        expected: Mapping[str, Sequence[Any]],
        level: float,
        width: float,
    ) -> Tensor:
        """Return the mean squared distance of the costs from where they should be by now.

        Args:
            first: Expected ranks at the beginning, by layer.
            expected: Those of now.
            level: Share of the way to the goals, 0 to 1.
            width: Distance, as a share of what the layers cost whole, at which the penalty is 1.
        """
        groups = [([name], self.cost(name, ranks)) for name, ranks in self.said.items()]
        if self.budget is not None:
            groups.append((self.shared, self.budget))
        penalties = []
        for names, budget in groups:
            whole = sum(self.whole(name) for name in names)
            begun = sum(self._expected(name, first[name]) for name in names)
            now = sum((self._expected(name, expected[name]) for name in names), torch.zeros(()))
            goal = begun + (budget - begun) * level
            penalties.append(((now - goal) / (whole * width)).square())
        return torch.stack(penalties).mean()

    def final_ranks(self, likelihoods: Mapping[str, Sequence[Tensor]]) -> dict[str, list[int]]:
        """Drop the least likely directions, one by one over all layers that share the budget, until it is met.

        Args:
            likelihoods: By layer, for each mode how much each direction shall stay, ``[directions]``.

        Returns:
            How many directions of each mode stay; at least one.
        """
        ranks = {
            name: list(self.said.get(name, [own.numel() for own in modes]))
            for name, modes in likelihoods.items()
        }
        if self.budget is None:
            return ranks
        whole = {name: self.whole(name) for name in self.shared}
        costs = {name: self.cost(name, ranks[name]) for name in self.shared}
        spent = sum(min(costs[name], whole[name]) for name in self.shared)
        order = sorted(
            (float(value), name, mode)
            for name in self.shared
            for mode, own in enumerate(likelihoods[name])
            for value in own.detach().cpu()
        )
        for _, name, mode in order:
            if spent <= self.budget:
                break
            if ranks[name][mode] == 1:
                continue
            ranks[name][mode] -= 1
            before, costs[name] = costs[name], self.cost(name, ranks[name])
            spent += min(costs[name], whole[name]) - min(before, whole[name])
        return ranks

    def _expected(self, name: str, ranks: Sequence[Any]) -> Any:
        return self.problems[name].expected_cost(ranks, self.unit)
