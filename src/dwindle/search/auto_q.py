"""AutoQ: an agent that walks through a model's layers and learns how many bits each one needs.

After HAQ (Wang et al. 2019, arXiv:1811.08886) and NNCF's AutoQ: a DDPG agent sees a layer's shape and what it did
before, its action becomes a number of bits, bits are then taken away from the last layer on until the budget is met,
and all steps of a walk are rewarded by what the quantized model scores, without training, above the most bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.mixed_precision.result import MixedPrecision
from dwindle.search.bit_problem import BitProblem, NamedBits
from dwindle.search.ddpg import Agent, AgentOptions, Transition
from dwindle.search.problem import Problem
from dwindle.search.running import Algorithm, Outcome, Proposal, Proposals, Search, best_of, run_search
from dwindle.search.trial import Trial

__all__ = ["AutoQ", "action_of", "bits_of", "search_bits"]


def bits_of(action: float, choices: Sequence[int]) -> int:
    """Return the choice that an action in [0, 1] means: equal parts of the interval, the fewest bits first."""
    return choices[min(int(action * len(choices)), len(choices) - 1)]


def action_of(bits: int, choices: Sequence[int]) -> float:
    """Return the middle of the part of [0, 1] that means a number of bits."""
    return (list(choices).index(bits) + 0.5) / len(choices)


@dataclass(frozen=True)
class AutoQ:
    """Learns bits with a DDPG agent; defaults are NNCF's.

    Attributes:
        episodes: Trials in all; each is one walk through all variables.
        warmup: Episodes with constant noise, before the agent learns.
        agent: Settings of the agent.
        seed: Of the agent.
    """

    episodes: int = 100
    warmup: int = 20
    agent: AgentOptions = field(default_factory=lambda: AgentOptions(noise_decay=0.995))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.warmup < 0:
            raise ConfigError(f"episodes {self.episodes} must be at least 1, warmup {self.warmup} at least 0")

    def total(self, problem: Any) -> int | None:
        """One trial an episode."""
        return self.episodes

    def propose(self, search: Search) -> Proposals:
        """Walk, be rewarded, learn."""
        problem = cast(BitProblem, search.problem)
        states = _states(problem)
        agent = Agent(len(states[0]) + 1, self.agent, self.seed)
        trials: list[Trial] = []
        for episode in range(self.episodes):
            bits, seen = _walk(problem, agent, states, episode, self.warmup)
            (trial,) = yield [Proposal(search.problem, cast(Any, bits))]
            trials.append(trial)
            lowest = min((own.score for own in trials if own.error is None), default=0.0)
            reward = (trial.score if trial.error is None else lowest) - search.baseline.score
            agent.remember(_transitions(problem, bits, seen, reward))
            if episode >= self.warmup:
                for _ in seen:
                    agent.learn()
        return Outcome(best_of(trials, search.problem))


def _states(problem: BitProblem) -> list[tuple[float, ...]]:
    """Return what is known of each variable before anything is done: its place and facts, scaled to [0, 1]."""
    variables = problem.space.variables
    tops = [
        max(max(own.facts[column] for own in variables), 1e-12) for column in range(len(variables[0].facts))
    ]
    return [
        (place / len(variables), *(fact / top for fact, top in zip(own.facts, tops, strict=True)))
        for place, own in enumerate(variables)
    ]


def _walk(
    problem: BitProblem, agent: Agent, states: Sequence[tuple[float, ...]], episode: int, warmup: int
) -> tuple[NamedBits, list[tuple[float, ...]]]:
    """Return the bits of one episode, brought to the budget, and the states that the agent saw."""
    bits: NamedBits = {}
    seen: list[tuple[float, ...]] = []
    previous = 1.0
    for variable, state in zip(problem.space.variables, states, strict=True):
        seen.append((*state, previous))
        bits[variable.name] = bits_of(agent.act(seen[-1], episode, warmup), variable.choices)
        previous = action_of(bits[variable.name], variable.choices)
    return problem.space.lowered(bits, problem.cost.predicted, problem.limit), seen


def _transitions(
    problem: BitProblem, bits: NamedBits, seen: Sequence[tuple[float, ...]], reward: float
) -> list[Transition]:
    """Every step of an episode with what was done in the end, each with the reward of the whole."""
    following = [*seen[1:], seen[-1]]
    return [
        Transition(state, action_of(bits[own.name], own.choices), reward, after, place == len(seen) - 1)
        for place, (own, state, after) in enumerate(
            zip(problem.space.variables, seen, following, strict=True)
        )
    ]


def search_bits(
    model: nn.Module,
    calibration_data: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    algorithm: Algorithm | None = None,
    storage: Any = None,
    progress: bool | None = None,
    **problem: Any,
) -> MixedPrecision:
    """Choose the bits of every layer by trials: each quantizes the model and scores it.

    Args:
        model: A trained float model; it is not changed.
        calibration_data: Batches for :func:`dwindle.quantize`.
        evaluate: Score of a quantized model, higher is better.
        algorithm: :class:`AutoQ` when not given, or :class:`SimulatedAnnealing`.
        storage: A folder that keeps every trial as soon as it is finished; a search that was killed goes on from it.
        progress: Show a progress bar; None means only when the error output is a terminal.
        **problem: More of :class:`BitProblem`: ``ratio``, ``cost``, ``bits``, ``activations``, ``options``, ...

    Returns:
        The choice, with its trials.

    Raises:
        ConfigError: An argument is not valid, or the ratio cannot be reached.
        DwindleError: No trial succeeded.
    """
    own = BitProblem(model, calibration_data, evaluate, **problem)
    found = run_search(cast(Problem, own), algorithm or AutoQ(), storage=storage, progress=progress)
    return replace(own.described(found.best.counts), harm=None, trials=tuple(found.trials))
