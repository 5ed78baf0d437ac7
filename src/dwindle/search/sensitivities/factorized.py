"""Factorization: every layer alone has the weight of the chain that ``dw.factorize`` would put in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.config.schema import FactorizationSetting
from dwindle.factorization.planning import layer_weight, selected_settings, unfit_layers
from dwindle.factorization.ranks import LayerProblem, said_ranks
from dwindle.graph.macs import count_macs
from dwindle.realize.factorize import layer_chain, layer_problems
from dwindle.search.sensitivities.points import Level, SensitivityTarget
from dwindle.search.sensitivities.subject import Selection
from dwindle.training.inputs import Inputs

__all__ = ["FactorizedLayers"]


class FactorizedLayers:
    """The linear layers and convolutions of a model, each of low rank alone.

    A chain equals the one layer with its product as weight (``dw.factorize`` proves that), so the product takes the
    weight's place while it is scored.

    Args:
        model: A float model that may be changed for the time of a score.
        example: Arguments of its forward: where layers compute, and how often.
        data: Batches, where chains keep what matters on them rather than what is large; None.
        rank_ratios: Shares of the full rank.
        ranks: Ranks besides.
        method: As in :func:`dwindle.factorize`.
        selection: Only these modules.
        options: What else a point depends on, as plain data.

    Raises:
        ConfigError: The method is not known.
    """

    kind = "factorization"

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        data: Any,
        *,
        rank_ratios: Sequence[float],
        ranks: Sequence[int],
        method: str,
        selection: Selection,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.method, self.options = model, method, dict(options)
        self.notes: list[str] = []
        common = FactorizationSetting.model_validate({"method": method})
        settings = selected_settings(model, None, common)
        settings = {name: own for name, own in settings.items() if selection is None or name in selection}
        left = unfit_layers(model, list(settings))
        self.problems: dict[str, LayerProblem]
        self.problems, self._moments = layer_problems(model, settings, example, data, left)
        self.notes += [f"factorization: {name} stays whole: {reason}" for name, reason in left.items()]
        self.total = {
            "macs": float(max(count_macs(model, *example), 1)),
            "params": float(sum(own.numel() for own in model.parameters())),
        }
        wanted = [{"rank_ratio": ratio} for ratio in rank_ratios] + [{"rank": rank} for rank in ranks]
        self.modules = {f"{name}.weight": name for name in self.problems}
        self._levels = {
            name: self._levels_of(self.problems[own], wanted) for name, own in self.modules.items()
        }
        self.targets = tuple(
            SensitivityTarget(self.kind, name, (name,), self.problems[own].form.elements)
            for name, own in self.modules.items()
            if self._levels[name]
        )

    def levels(self, target: str) -> list[Level]:
        """Return the levels of a layer, the highest rank first; full ranks, at which nothing is lost, are left out."""
        return self._levels[target]

    def _levels_of(self, problem: LayerProblem, wanted: Sequence[Mapping[str, Any]]) -> list[Level]:
        found: dict[tuple[int, ...], Level] = {}
        for values in wanted:
            setting = FactorizationSetting.model_validate(dict(values))
            try:
                ranks = said_ranks(problem, setting)
            except ConfigError as error:  # CP has no full rank that a share could mean
                self.notes.append(f"factorization: {error}")
                continue
            if ranks is None or (ranks == problem.full and self.method != "cp"):
                continue
            saved = problem.whole_cost("macs") - problem.cost(ranks, "macs")
            share = 1 - saved / self.total["macs"]
            found[ranks] = Level(sum(ranks) / sum(problem.full), ranks, share)
        return sorted(found.values(), key=lambda level: -level.value)

    @contextmanager
    def variant(self, target: str, level: Level) -> Iterator[nn.Module]:
        """Give the model with the product of a chain in the place of one layer's weight."""
        name = self.modules[target]
        chain = layer_chain(self.model, name, self.problems[name], level.detail, self._moments.get(name))
        module = self.model.get_submodule(name)
        pairs = [(layer_weight(module), chain.layer.weight)]
        if chain.bias is not None and chain.layer.bias is not None:
            pairs.append((chain.layer.bias, chain.bias))
        saved = [(parameter, parameter.detach().clone()) for parameter, _ in pairs]
        try:
            with torch.no_grad():
                for parameter, value in pairs:
                    parameter.copy_(value)
            yield self.model
        finally:
            with torch.no_grad():
                for parameter, value in saved:
                    parameter.copy_(value)
