"""AutoCompress: in rounds, annealing finds the ratios, ADMM trains the model toward them, and it is cut.

Liu et al., "AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates",
arXiv:1907.03141. Round ``i`` of ``n`` may leave ``share ** (i / n)`` of the cost, so that every round removes the same
part of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.graph.modes import modes_kept
from dwindle.graph.stand_ins import copied
from dwindle.pruning.admm import ADMMPruner
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.surgery import _held, tensor_slots
from dwindle.search.annealing import SimulatedAnnealing
from dwindle.search.problem import Problem
from dwindle.search.rounds import Round, advanced
from dwindle.search.running import Outcome, Proposal, Proposals, Search
from dwindle.search.space import Variable
from dwindle.search.trial import Trial
from dwindle.training.compressor import Compressor

__all__ = ["AutoCompress", "config_of", "round_share"]


def round_share(share: float, position: int, rounds: int) -> float:
    """Return the share of the cost that may be left after round ``position`` of ``rounds``, counted from 1."""
    return float(share ** (position / rounds))


def config_of(problem: Problem, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the config_list of a pruner that asks for given counts.

    Args:
        problem: The model.
        counts: How many indices of each variable stay, by name.

    Raises:
        ConfigError: A variable has no weight whose channels a pruner could rank.
    """
    entries = []
    for variable in problem.space.variables:
        gone = variable.size - counts.get(variable.name, variable.size)
        if gone:
            module, name, granularity = _place(problem.model, variable)
            ratio = min(1.0, (gone + 0.25) / variable.size)  # pruners round down to whole channels
            entries.append(
                {
                    "op_names": [module],
                    "target_names": [name],
                    "sparse_ratio": ratio,
                    "granularity": granularity,
                }
            )
    return entries


def _place(model: nn.Module, variable: Variable) -> tuple[str, str, str]:
    """Return a module, a parameter of it, and the granularity whose channels are a variable."""
    for parameter, dim in variable.info.parameter_dims:
        module, _, name = parameter.rpartition(".")
        owner = model.get_submodule(module)
        tensor = owner._parameters.get(name)
        if module and tensor is not None and tensor.dim() >= 2:
            for granularity in ("out_channel", "in_channel"):
                blocks = Granularity.of_module(granularity, owner, Target(module, name))
                if blocks.kind == "channel" and blocks.groups == 1 and blocks.axis % tensor.dim() == dim:
                    return module, name, granularity
    raise ConfigError(f"{variable.name}: no weight of it has channels that a pruner can rank")


@dataclass(frozen=True)
class AutoCompress:
    """Anneals, trains with ADMM, cuts, and again.

    Attributes:
        train: Trains a model with compressors, for more than ``training_steps`` steps: what follows them is the
            retraining of the masked model. ``dwindle.training.fit(model, ..., compressors=compressors)`` does it.
        training_steps: Optimizer steps of ADMM.
        interval_steps: Optimizer steps of one iteration of ADMM.
        rho: Weight of ADMM's term.
        rounds: How often.
        annealing: The search for ratios in each round.
    """

    train: Callable[[nn.Module, Sequence[Compressor]], None]
    training_steps: int
    interval_steps: int
    rho: float = 1e-3
    rounds: int = 3
    annealing: SimulatedAnnealing = field(default_factory=SimulatedAnnealing)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds: {self.rounds} is not a positive number")
        if not 1 <= self.interval_steps < self.training_steps:
            raise ConfigError(
                f"interval_steps {self.interval_steps} must be at least 1 and below training_steps "
                f"{self.training_steps}"
            )

    def total(self, problem: Problem) -> int | None:
        """The trials of every annealing, and the end of every round."""
        each = self.annealing.total(problem)
        return None if each is None else (each + 1) * self.rounds

    def propose(self, search: Search) -> Proposals:
        """Go through the rounds."""
        share = search.problem.budget.share
        whole = search.problem.limit / share
        here, now = Round(search.problem), search.baseline
        for position in range(1, self.rounds + 1):
            problem = here.problem.limited(whole * round_share(share, position, self.rounds))
            inner = replace(self.annealing, seed=self.annealing.seed + position - 1)
            outcome = yield from inner.propose(Search(problem, now, search.store))
            here = _next(self, search, here, outcome.trial)
            (now,) = yield [Proposal(here.problem, here.problem.space.full())]
        return Outcome(now, here.problem.model, here.proofs)


def _next(algorithm: AutoCompress, search: Search, here: Round, best: Trial) -> Round:
    return advanced(
        search, here, best, "autocompress", lambda: _trained_and_cut(algorithm, here.problem, best)
    )


def _trained_and_cut(algorithm: AutoCompress, problem: Problem, trial: Trial) -> ShrinkResult:
    """Train a copy of the model toward the counts of a trial, and cut what ADMM has made zero, with proof."""
    model = copied(problem.model)
    config = config_of(problem, trial.counts)
    if config:
        pruner = ADMMPruner(
            model,
            config,
            problem.inputs,
            problem.kwargs,
            training_steps=algorithm.training_steps,
            interval_steps=algorithm.interval_steps,
            rho=algorithm.rho,
        )
        with problem.seeded(trial.key), modes_kept(model):
            model.train()
            algorithm.train(model, [pruner])
        if not pruner.finished:
            raise ConfigError(
                f"train: it ended after {pruner.steps} of {algorithm.training_steps} training_steps of ADMM"
            )
        pruner.detach()
    trained = problem.of_round(model, problem.base)
    _rank_zeros_last(trained, trial.counts)
    return trained.build(trained.space.from_names(trial.counts), verify=True)


def _rank_zeros_last(problem: Problem, counts: Mapping[str, int]) -> None:
    """Let the channels that ADMM made zero go first, whatever the other weights on their axis are."""
    tensors = {name: _held(*holders[0]) for name, holders in tensor_slots(problem.model).items()}
    for variable in problem.space.variables:
        if counts[variable.name] == variable.size:
            continue
        alive = torch.ones(variable.size, dtype=torch.float64)
        module, name, _ = _place(problem.model, variable)
        parameter = f"{module}.{name}"
        for place, dim in variable.info.parameter_dims:
            if place == parameter:
                others = [other for other in range(tensors[place].dim()) if other != dim]
                sums = tensors[place].detach().double().cpu().abs().sum(others)
                index = problem.analysis.positions(place, dim)[variable.axis]
                here = index >= 0
                own = torch.zeros_like(alive).index_add_(0, index[here], sums[here])
                alive = alive * (own > 0)
        problem.scores[variable.axis] = problem.scores[variable.axis] * alive
