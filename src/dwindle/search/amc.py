"""AMC: an agent that reads the model layer by layer and learns the ratio of each (He et al., arXiv:1802.03494).

A layer is a coupled axis here, so every architecture has them; what the paper says about the cost of a layer is said
with the cost of counts, which also holds where two axes multiply each other's cost, and for a measured latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dwindle.config.errors import ConfigError
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.graph.nodes import Node
from dwindle.search.ddpg import Agent, AgentOptions, Transition
from dwindle.search.problem import Problem
from dwindle.search.running import Outcome, Proposal, Proposals, Search, best_of
from dwindle.search.space import CostOf, Space, Variable
from dwindle.search.trial import Trial

__all__ = ["AMC", "REWARDS", "STATE", "LayerStates", "most_that_may_stay"]

#: The parts of a state, in order (section 3.1 of the paper).
STATE = ("t", "n", "c", "h", "w", "stride", "k", "cost", "reduced", "rest", "previous")

#: Rewards of a score and a cost (section 3.3): the first for a budget, the second to shrink at no loss of score.
REWARDS: dict[str, Callable[[float, float], float]] = {
    "error": lambda score, cost: -(1 - score),
    "error_log_cost": lambda score, cost: -(1 - score) * math.log(cost),
}


def most_that_may_stay(space: Space, cost: CostOf, budget: float, chosen: Counts, position: int) -> int:
    """Return the largest count of one variable with which the budget can still be met (the paper's algorithm 1).

    All later variables are taken to lose the most that they may. Where costs add up over layers, the ratio of this
    count is the paper's ``W_duty / W_t``.

    Args:
        space: The variables.
        cost: Falls with falling counts.
        budget: In the unit of the cost.
        chosen: Counts of the variables before.
        position: Which variable.
    """
    later = {variable.axis: variable.least for variable in space.variables[position:]}
    variable = space.variables[position]
    low, high = variable.least, variable.size
    while low < high:
        middle = (low + high + 1) // 2
        if cost({**later, **chosen, variable.axis: middle}) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


class LayerStates:
    """The states of an episode, each number scaled to [0, 1].

    Args:
        problem: The model and its cost.
    """

    def __init__(self, problem: Problem) -> None:
        self.space = problem.space
        self.cost = problem.cost.predicted
        self.whole = self.cost(self.space.full())
        count = len(self.space.variables)
        fixed = [
            [position / count, *_layer(problem, variable), self._share([variable])]
            for position, variable in enumerate(self.space.variables)
        ]
        tops = [max(max(row[column] for row in fixed), 1e-12) for column in range(len(fixed[0]))]
        self.fixed = [[value / top for value, top in zip(row, tops, strict=True)] for row in fixed]
        self.rest = [self._share(self.space.variables[position + 1 :]) for position in range(count)]

    def _share(self, variables: Sequence[Variable]) -> float:
        """Share of the cost that vanishes with some variables."""
        nothing = {variable.axis: 0 for variable in variables}
        return (self.whole - self.cost({**self.space.full(), **nothing})) / self.whole

    def state(self, chosen: Counts, position: int, previous: float) -> tuple[float, ...]:
        """Return the state before a variable's action.

        Args:
            chosen: Counts of the variables before.
            position: Which variable.
            previous: The action before; 0 at the first.
        """
        reduced = (self.whole - self.cost({**self.space.full(), **chosen})) / self.whole
        return (*self.fixed[position], reduced, self.rest[position], previous)


def _layer(problem: Problem, variable: Variable) -> list[float]:
    """Return n, c, h, w, stride and k of the first convolution or product whose outputs are a variable."""
    names = {id(value): name for name, value in problem.analysis.trace.parameters.items()}
    for node in problem.analysis.trace.live_nodes():
        for value in node.inputs():
            if id(value) in names and len(value.shape) >= 2 and _makes(node, variable.axis):
                kernel = value.shape[2:]
                sizes = node.output.shape[2:] if kernel else node.output.shape[1:-1]
                inputs = math.prod(value.shape[:2]) // variable.size
                wide = [*map(float, sizes), 1.0, 1.0]
                return [
                    float(variable.size),
                    float(inputs),
                    wide[0],
                    wide[1],
                    _stride(node),
                    float(kernel[0]) if kernel else 1.0,
                ]
    return [float(variable.size), 0.0, 1.0, 1.0, 1.0, 1.0]


def _makes(node: Node, axis: Axis) -> bool:
    """Whether an axis is among those of a product's output."""
    if not any(part in node.name for part in ("conv", "linear", "mm", "matmul")):
        return False
    return any(leaf is axis.find() for own in node.output.axes for leaf in own.leaves())


def _stride(node: Node) -> float:
    """The first stride of a convolution; 1 for any other operator."""
    names = [argument.name for argument in node.target._schema.arguments]
    given = node.argument("stride") if "stride" in names else 1
    first = given[0] if isinstance(given, list | tuple) and given else given
    return float(first) if isinstance(first, int) else 1.0


@dataclass(frozen=True)
class AMC:
    """Learns ratios with a DDPG agent; defaults are the paper's.

    Attributes:
        episodes: Trials in all; each is one walk through all axes.
        warmup: Episodes with constant noise, before the agent learns.
        reward: ``"error"`` (``-error``: the best score within the budget), ``"error_log_cost"``
            (``-error * log(cost)``: give a budget of 1 to shrink only as far as the score allows), or your own
            ``f(score, cost) -> reward``. Error is one minus the score.
        agent: Settings of the agent.
        seed: Of the agent.
    """

    episodes: int = 400
    warmup: int = 100
    reward: str | Callable[[float, float], float] = "error"
    agent: AgentOptions = field(default_factory=AgentOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.warmup < 0:
            raise ConfigError(f"episodes {self.episodes} must be at least 1, warmup {self.warmup} at least 0")
        if not callable(self.reward) and self.reward not in REWARDS:
            raise ConfigError(f"reward {self.reward!r} is not one of {', '.join(REWARDS)}, nor a function")

    def total(self, problem: Problem) -> int | None:
        """One trial an episode, and the last one."""
        return self.episodes + 1

    def propose(self, search: Search) -> Proposals:
        """Walk, be rewarded, learn; at last, give what is left of the budget back to the best."""
        problem, space = search.problem, search.problem.space
        if self.reward == "error_log_cost" and problem.is_measured:
            raise ConfigError(
                "reward 'error_log_cost' takes the logarithm of a counted cost, not of a latency"
            )
        reward_of = self.reward if callable(self.reward) else REWARDS[self.reward]
        agent = Agent(len(STATE), self.agent, self.seed)
        states = LayerStates(problem)
        trials: list[Trial] = []
        best: tuple[float, Trial] | None = None
        for episode in range(self.episodes):
            counts, steps = _walk(problem, agent, states, episode, self.warmup)
            (trial,) = yield [Proposal(problem, counts)]
            trials.append(trial)
            score = trial.score if trial.error is None else 0.0
            reward = reward_of(score, trial.cost)
            if problem.meets(trial) and (best is None or reward > best[0]):
                best = (reward, trial)
            agent.remember(_transitions(steps, reward))
            if episode >= self.warmup:
                for _ in steps:
                    agent.learn()
        chosen = best[1] if best is not None else best_of(trials, problem)
        fuller = space.filled(space.from_names(chosen.counts), problem.cost.predicted, problem.limit)
        (trial,) = yield [Proposal(problem, fuller)]
        better = problem.meets(trial) and reward_of(trial.score, trial.cost) >= reward_of(
            chosen.score, chosen.cost
        )
        return Outcome(trial if better else chosen)


def _walk(
    problem: Problem, agent: Agent, states: LayerStates, episode: int, warmup: int
) -> tuple[Counts, list[tuple[tuple[float, ...], float]]]:
    """Return the counts of one episode, and its states and actions."""
    space, cost = problem.space, problem.cost.predicted
    chosen: Counts = {}
    steps: list[tuple[tuple[float, ...], float]] = []
    previous = 0.0
    for position, variable in enumerate(space.variables):
        state = states.state(chosen, position, previous)
        action = min(agent.act(state, episode, warmup), variable.largest_ratio)
        most = most_that_may_stay(space, cost, problem.limit, chosen, position)
        chosen[variable.axis] = min(variable.count_at(action), most)
        previous = 1 - chosen[variable.axis] / variable.size
        steps.append((state, previous))
    counts = space.solved(chosen)
    if cost(counts) > problem.limit:  # constraints between counts raised some
        counts = space.fit(space.ratios(chosen), cost, problem.limit)
    return counts, steps


def _transitions(steps: Sequence[tuple[tuple[float, ...], float]], reward: float) -> list[Transition]:
    """Every step of an episode, each with the reward of its end."""
    following = [state for state, _ in steps[1:]] + [steps[-1][0]]
    return [
        Transition(state, action, reward, after, position == len(steps) - 1)
        for position, ((state, action), after) in enumerate(zip(steps, following, strict=True))
    ]
