"""Deep deterministic policy gradient (Lillicrap et al., arXiv:1509.02971) as AMC uses it (arXiv:1802.03494, section 3).

Two networks of two hidden layers each, with slowly following twins; an exploration noise from a truncated normal; and
a baseline that is subtracted from the reward, because all steps of an episode share the reward of its end.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError

__all__ = ["Agent", "AgentOptions", "Transition", "follow", "targets", "truncated_normal"]


def truncated_normal(
    mean: float, deviation: float, uniform: float, low: float = 0.0, high: float = 1.0
) -> float:
    """Return a draw from a normal distribution cut off at both ends, by inversion.

    Args:
        mean: Of the normal distribution.
        deviation: Its standard deviation; at 0 the mean itself is returned, within the ends.
        uniform: A uniform random number in [0, 1).
        low: The lower end.
        high: The upper end.
    """
    if deviation <= 0:
        return min(max(mean, low), high)
    normal = torch.distributions.Normal(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(deviation, dtype=torch.float64)
    )
    ends = normal.cdf(torch.tensor([low, high], dtype=torch.float64))
    drawn = float(normal.icdf(ends[0] + uniform * (ends[1] - ends[0])))
    return min(max(drawn, low), high)


def targets(
    rewards: Tensor, baseline: float, following: Tensor, last: Tensor, discount: float = 1.0
) -> Tensor:
    """Return what the critic should say: ``r - b + discount * Q'(s', mu'(s'))``, without the rest at the last step.

    Args:
        rewards: ``[batch]``.
        baseline: Moving average of rewards.
        following: ``Q'(s', mu'(s'))``, ``[batch]``.
        last: 1 where the episode ended, else 0, ``[batch]``.
        discount: AMC uses 1.
    """
    return rewards - baseline + discount * (1 - last) * following


def follow(twin: nn.Module, network: nn.Module, share: float) -> None:
    """Move a twin toward its network in place: ``twin = share * network + (1 - share) * twin``."""
    with torch.no_grad():
        for slow, fast in zip(twin.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, share)


class Actor(nn.Module):
    """State to action: two hidden layers, a sigmoid at the end.

    Args:
        state: Length of a state.
        hidden: Width of the hidden layers.
    """

    def __init__(self, state: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second, self.out = (
            nn.Linear(state, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, states: Tensor) -> Tensor:
        """Return actions in (0, 1), ``[batch, 1]``, for ``[batch, state]``."""
        inner = torch.relu(self.second(torch.relu(self.first(states))))
        return torch.sigmoid(self.out(inner))


class Critic(nn.Module):
    """State and action to value: two hidden layers, the first sees both.

    Args:
        state: Length of a state.
        hidden: Width of the hidden layers.
    """

    def __init__(self, state: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second, self.out = (
            nn.Linear(state + 1, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return values, ``[batch, 1]``."""
        inner = torch.relu(self.first(torch.cat([states, actions], 1)))
        return self.out(torch.relu(self.second(inner)))


@dataclass(frozen=True)
class AgentOptions:
    """Settings of the agent; defaults are those of AMC (names in brackets are NNI's).

    Attributes:
        hidden: Width of the hidden layers.
        critic_rate: Learning rate of the critic (``lr_c``).
        actor_rate: Learning rate of the actor (``lr_a``).
        batch: Transitions of one update (``bsize``).
        memory: Transitions that are remembered (``rmsize``).
        share: How fast the twins follow (``tau``).
        discount: Of later values.
        noise: Standard deviation of the exploration noise at the start (``init_delta``).
        noise_decay: Factor of the noise after every episode, once the warm-up is over (``delta_decay``).
        baseline_rate: How fast the moving average of rewards moves.
    """

    hidden: int = 300
    critic_rate: float = 1e-3
    actor_rate: float = 1e-4
    batch: int = 64
    memory: int = 2000
    share: float = 0.01
    discount: float = 1.0
    noise: float = 0.5
    noise_decay: float = 0.99
    baseline_rate: float = 0.5

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("share", "noise_decay", "baseline_rate", "discount"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} does not lie above 0 and up to 1")


@dataclass(frozen=True)
class Transition:
    """One step of an episode.

    Attributes:
        state: Before it.
        action: What was done, after all bounds.
        reward: Of the whole episode.
        following: The state after it.
        last: Whether the episode ended.
    """

    state: tuple[float, ...]
    action: float
    reward: float
    following: tuple[float, ...]
    last: bool


class Agent:
    """Learns actions between 0 and 1 from rewards.

    Args:
        states: Length of a state.
        options: Settings.
        seed: Of its weights, its noise and its choice of memories; the global generators are left alone.
        dtype: Of its numbers.
    """

    def __init__(
        self,
        states: int,
        options: AgentOptions | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.options = options or AgentOptions()
        self.dtype = dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = Actor(states, self.options.hidden).to(dtype)
            self.critic = Critic(states, self.options.hidden).to(dtype)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=self.options.actor_rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.options.critic_rate)
        self.memory: deque[Transition] = deque(maxlen=self.options.memory)
        self.chance = random.Random(seed)
        self.baseline: float | None = None

    def act(self, state: Sequence[float], episode: int, warmup: int) -> float:
        """Return an action with exploration noise.

        Args:
            state: The state.
            episode: Its number, from 0.
            warmup: Number of episodes with constant noise; then it decays.
        """
        with torch.no_grad():
            mean = float(self.actor(torch.tensor([list(state)], dtype=self.dtype)))
        deviation = self.options.noise * self.options.noise_decay ** max(episode - warmup, 0)
        return truncated_normal(mean, deviation, self.chance.random())

    def remember(self, transitions: Sequence[Transition]) -> None:
        """Take over an episode, and move the baseline toward its reward."""
        self.memory.extend(transitions)
        reward = transitions[-1].reward
        if self.baseline is None:
            self.baseline = reward
        self.baseline += self.options.baseline_rate * (reward - self.baseline)

    def learn(self) -> None:
        """Make one update from remembered transitions; nothing happens while there are fewer than a batch."""
        if len(self.memory) >= self.options.batch:
            self.update(self.chance.sample(list(self.memory), self.options.batch))

    def update(self, batch: Sequence[Transition]) -> None:
        """Move the critic toward its targets, the actor up the critic, and the twins after both."""
        states = torch.tensor([entry.state for entry in batch], dtype=self.dtype)
        actions = torch.tensor([[entry.action] for entry in batch], dtype=self.dtype)
        following = torch.tensor([entry.following for entry in batch], dtype=self.dtype)
        rewards = torch.tensor([entry.reward for entry in batch], dtype=self.dtype)
        last = torch.tensor([float(entry.last) for entry in batch], dtype=self.dtype)
        with torch.no_grad():
            later = self.slow_critic(following, self.slow_actor(following))[:, 0]
            wanted = targets(rewards, self.baseline or 0.0, later, last, self.options.discount)
        self.critic_optimizer.zero_grad()
        (self.critic(states, actions)[:, 0] - wanted).square().mean().backward()
        self.critic_optimizer.step()
        self.actor_optimizer.zero_grad()
        (-self.critic(states, self.actor(states)).mean()).backward()
        self.actor_optimizer.step()
        follow(self.slow_actor, self.actor, self.options.share)
        follow(self.slow_critic, self.critic, self.options.share)
