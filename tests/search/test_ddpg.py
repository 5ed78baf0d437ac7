"""The agent's update against float64 references: targets, gradients by finite differences, Adam, followers, noise."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.search import AgentOptions
from dwindle.search.ddpg import Agent, Transition, follow, targets, truncated_normal

OPTIONS = AgentOptions(hidden=5, batch=6, share=0.2, critic_rate=0.01, actor_rate=0.003, discount=0.9)


def transitions(count: int, seed: int = 0) -> list[Transition]:
    chance = random.Random(seed)

    def state() -> tuple[float, ...]:
        return tuple(chance.random() for _ in range(3))

    return [
        Transition(state(), chance.random(), -chance.random(), state(), number % 3 == 2)
        for number in range(count)
    ]


def forward(network: nn.Module, rows: np.ndarray) -> np.ndarray:
    """A network of three layers in NumPy, without the last nonlinearity."""
    values = [parameter.detach().numpy() for parameter in network.parameters()]
    inner = np.maximum(rows @ values[0].T + values[1], 0)
    return np.maximum(inner @ values[2].T + values[3], 0) @ values[4].T + values[5]


def actions_of(network: nn.Module, states: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-forward(network, states)))


def gradients(loss, network: nn.Module, step: float = 1e-6) -> list[np.ndarray]:
    """Central differences of a NumPy loss by every parameter."""
    found = []
    for parameter in network.parameters():
        data = parameter.detach().numpy()
        gradient = np.zeros_like(data)
        for place in np.ndindex(data.shape):
            kept = data[place]
            data[place] = kept + step
            up = loss()
            data[place] = kept - step
            down = loss()
            data[place] = kept
            gradient[place] = (up - down) / (2 * step)
        found.append(gradient)
    return found


def adam(values: list[np.ndarray], gradient: list[np.ndarray], rate: float) -> list[np.ndarray]:
    """The first step of Adam: both moments are corrected to the gradient itself."""
    return [v - rate * g / (np.abs(g) + 1e-8) for v, g in zip(values, gradient, strict=True)]


def numbers(network: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in network.parameters()]


def test_one_update_is_that_of_the_formulas() -> None:
    agent = Agent(3, OPTIONS, seed=7, dtype=torch.float64)
    with torch.no_grad():  # followers that differ from what they follow
        for network in (agent.slow_actor, agent.slow_critic):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    agent.baseline = -0.4
    batch = transitions(6)
    states = np.array([entry.state for entry in batch])
    following = np.array([entry.following for entry in batch])
    actions = np.array([[entry.action] for entry in batch])
    later = forward(agent.slow_critic, np.hstack([following, actions_of(agent.slow_actor, following)]))[:, 0]
    wanted = np.array(
        [e.reward + 0.4 + (0 if e.last else 0.9 * q) for e, q in zip(batch, later, strict=True)]
    )
    twin = copy.deepcopy(agent)

    def critic_loss() -> float:
        return float(np.mean((forward(twin.critic, np.hstack([states, actions]))[:, 0] - wanted) ** 2))

    new_critic = adam(numbers(agent.critic), gradients(critic_loss, twin.critic), OPTIONS.critic_rate)
    for parameter, value in zip(twin.critic.parameters(), new_critic, strict=True):
        parameter.detach().numpy()[...] = value

    def actor_loss() -> float:
        return -float(np.mean(forward(twin.critic, np.hstack([states, actions_of(twin.actor, states)]))))

    new_actor = adam(numbers(agent.actor), gradients(actor_loss, twin.actor), OPTIONS.actor_rate)
    slow = {name: numbers(network) for name, network in (("a", agent.slow_actor), ("c", agent.slow_critic))}
    agent.update(batch)
    for network, expected in ((agent.critic, new_critic), (agent.actor, new_actor)):
        for got, value in zip(numbers(network), expected, strict=True):
            np.testing.assert_allclose(got, value, atol=2e-6)
    for network, fast, before in (
        (agent.slow_actor, new_actor, slow["a"]),
        (agent.slow_critic, new_critic, slow["c"]),
    ):
        for got, new, old in zip(numbers(network), fast, before, strict=True):
            np.testing.assert_allclose(got, 0.2 * new + 0.8 * old, atol=2e-6)


def test_targets_end_with_the_episode() -> None:
    rewards, later, last = (
        torch.tensor(values, dtype=torch.float64) for values in ([-0.2, -0.3], [0.7, 0.9], [0.0, 1.0])
    )
    found = targets(rewards, -0.1, later, last, discount=0.5)
    np.testing.assert_allclose(found.numpy(), [-0.2 + 0.1 + 0.35, -0.3 + 0.1], rtol=1e-14)


def test_followers_move_by_their_share() -> None:
    fast, slow = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    before = [value.clone() for value in slow.parameters()]
    follow(slow, fast, 0.01)
    for old, new, target in zip(before, slow.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(new, 0.01 * target + 0.99 * old, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.5), (0.05, 0.2), (0.97, 0.1), (0.3, 2.0)])
def test_noise_is_a_truncated_normal(mean: float, deviation: float) -> None:
    """The draw of a uniform number is where the normalized area under the bell reaches it."""
    grid = np.linspace(0, 1, 200_001)
    density = np.exp(-((grid - mean) ** 2) / (2 * deviation**2))
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    for uniform in (0.0, 0.1, 0.5, 0.77, 0.999):
        expected = float(np.interp(uniform, area / area[-1], grid))
        assert truncated_normal(mean, deviation, uniform) == pytest.approx(expected, abs=1e-5)


def test_noise_decays_after_the_warm_up_only() -> None:
    agent = Agent(3, AgentOptions(hidden=4, noise=0.5, noise_decay=0.9), seed=1)
    state = (0.1, 0.2, 0.3)
    with torch.no_grad():
        mean = float(agent.actor(torch.tensor([state])))
    for episode, deviation in ((0, 0.5), (10, 0.5), (11, 0.45), (15, 0.5 * 0.9**5)):
        agent.chance = random.Random(3)
        uniform = random.Random(3).random()
        expected = truncated_normal(mean, deviation, uniform)
        assert agent.act(state, episode, 10) == pytest.approx(expected, rel=1e-12)


def test_the_baseline_is_a_moving_average_of_rewards() -> None:
    agent = Agent(3, AgentOptions(hidden=4, baseline_rate=0.25))
    expected = None
    for reward in (-0.5, -0.3, -0.9):
        agent.remember([Transition((0.0,) * 3, 0.5, reward, (0.0,) * 3, True)])
        expected = reward if expected is None else 0.75 * expected + 0.25 * reward
    assert agent.baseline == pytest.approx(expected, rel=1e-15)


def test_agents_of_one_seed_are_equal_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = Agent(3, OPTIONS, seed=2), Agent(3, OPTIONS, seed=2), Agent(3, OPTIONS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for agent in (first, second, other):
        agent.remember(transitions(20))
        agent.learn()
    assert all(
        torch.equal(a, b) for a, b in zip(first.actor.parameters(), second.actor.parameters(), strict=True)
    )
    assert not torch.equal(first.actor.first.weight, other.actor.first.weight)


def test_it_learns_the_action_that_is_rewarded() -> None:
    """A problem of one step whose best action depends on the state."""
    agent = Agent(1, AgentOptions(hidden=24, batch=32, actor_rate=2e-3, critic_rate=5e-3, share=0.05), seed=0)

    def wanted(state: float) -> float:
        return 0.2 + 0.6 * state

    chance = random.Random(0)
    for episode in range(260):
        state = (chance.random(),)
        action = agent.act(state, episode, 60)
        agent.remember([Transition(state, action, -((action - wanted(*state)) ** 2) * 4, state, True)])
        if episode >= 60:
            for _ in range(3):
                agent.learn()
    errors = []
    for state in (0.1, 0.5, 0.9):
        with torch.no_grad():
            errors.append(abs(float(agent.actor(torch.tensor([[state]]))) - wanted(state)))
    assert max(errors) < 0.15
    assert math.isfinite(sum(errors))


@pytest.mark.parametrize("arguments", [{"hidden": 0}, {"share": 0.0}, {"batch": 0}, {"noise_decay": 1.5}])
def test_bad_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        AgentOptions(**arguments)
