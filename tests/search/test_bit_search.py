"""Bits by trials: the budget, the agent's walk, and a search that goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.search import AgentOptions, AutoQ, BitProblem, SimulatedAnnealing, search_bits
from dwindle.search.auto_q import action_of, bits_of

SMALL = AgentOptions(hidden=8, batch=4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).eval()


def pictures() -> list[Tensor]:
    return [torch.randn(6, 1, 7, 7, generator=torch.Generator().manual_seed(1))]


def closeness(model: nn.Module) -> object:
    x = pictures()[0]
    expected = model(x).detach()
    return lambda own: -float((own(x) - expected).square().mean())


def test_actions_and_bits() -> None:
    assert [bits_of(own, (2, 4, 8)) for own in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [2, 2, 4, 4, 8, 8]
    assert all(bits_of(action_of(bits, (2, 4, 8)), (2, 4, 8)) == bits for bits in (2, 4, 8))


def test_variables_are_free_layers_with_their_facts() -> None:
    given = [{"op_names": ["5"], "target_names": ["weight"], "quant_dtype": "int8"}]
    model = net()
    problem = BitProblem(model, pictures(), closeness(model), config_list=given, ratio=1.2)
    assert [own.name for own in problem.space.variables] == ["0.weight", "2.weight"]
    first, second = problem.space.variables
    assert first.facts == (4.0, 1.0, 9.0, 6 * 25.0, 4 * 9.0, 6 * 25 * 4 * 9.0, 1.0, 1.0)
    assert second.facts == (4.0, 1.0, 9.0, 6 * 9.0, 4 * 9.0, 6 * 9 * 4 * 9.0, 1.0, 1.0)
    own = BitProblem(model, pictures(), closeness(model), activations="sensitive")
    assert len(own.space.variables) == 6


def test_bits_are_taken_from_the_last_layer_on_and_given_back() -> None:
    model = net()
    space = BitProblem(model, pictures(), closeness(model), cost="size", ratio=1.1).space
    weights = {"0.weight": 36, "2.weight": 36, "5.weight": 108}

    def cost(bits: dict[str, int]) -> float:
        return sum(weights[name] * own for name, own in bits.items())

    assert space.lowered(space.full(), cost, 1440 - 432) == {"0.weight": 8, "2.weight": 8, "5.weight": 4}
    assert space.lowered(space.full(), cost, 1440 - 433) == {"0.weight": 8, "2.weight": 4, "5.weight": 4}
    assert space.filled(space.smallest(), cost, 360 + 72) == {"0.weight": 4, "2.weight": 2, "5.weight": 2}
    fitted = space.fit({"5.weight": 0.5}, cost, 1440 - 432)
    assert fitted == {"0.weight": 8, "2.weight": 8, "5.weight": 4}
    with pytest.raises(ConfigError, match="fewest bits"):
        space.lowered(space.full(), cost, 359)


@pytest.mark.parametrize("algorithm", [AutoQ(6, warmup=2, agent=SMALL), SimulatedAnnealing(4.0, 1.0, 0.7)])
def test_a_search_keeps_the_budget_and_chooses_its_best_trial(algorithm: object) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = search_bits(model, pictures(), closeness(model), algorithm=algorithm, ratio=1.5)
    assert found.ratio >= 1.5
    assert all(8 * trial.cost / problem_cost(model) <= 8 / 1.5 for trial in found.trials)
    best = max(found.trials, key=lambda trial: (trial.score, -trial.cost))
    assert {name: bits for name, (bits, _) in found.bits.items()} == best.counts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = search_bits(model, pictures(), closeness(model), algorithm=algorithm, ratio=1.5)
    assert [trial.counts for trial in again.trials] == [trial.counts for trial in found.trials]


def problem_cost(model: nn.Module) -> float:
    problem = BitProblem(model, pictures(), closeness(model))
    return problem.cost.predicted(problem.space.full())


def test_a_search_goes_on_from_its_storage(tmp_path: Path) -> None:
    model, seen = net(), []
    score = closeness(model)

    def counting(own: nn.Module) -> float:
        seen.append(1)
        return score(own)

    first = search_bits(
        model, pictures(), counting, algorithm=AutoQ(3, warmup=1, agent=SMALL), storage=tmp_path, ratio=1.4
    )
    made = len(seen)
    longer = search_bits(
        model, pictures(), counting, algorithm=AutoQ(3, warmup=1, agent=SMALL), storage=tmp_path, ratio=1.4
    )
    assert len(seen) == made
    assert longer.bits == first.bits
    with pytest.raises(ConfigError, match="bits differ"):
        search_bits(model, pictures(), counting, bits=(3, 8), storage=tmp_path, ratio=1.4)


def test_what_is_refused() -> None:
    model = net()
    with pytest.raises(ConfigError, match="cannot be reached"):
        BitProblem(model, pictures(), closeness(model), ratio=5)
    with pytest.raises(ConfigError, match="gave no batch"):
        BitProblem(model, [], closeness(model))
    given = [{"op_types": ["Conv2d", "Linear"], "quant_dtype": "int8"}]
    with pytest.raises(ConfigError, match="no layer whose bits"):
        BitProblem(model, pictures(), closeness(model), config_list=given, ratio=1)
    with pytest.raises(ConfigError, match="no score"):
        search_bits(model, pictures(), lambda own: float("nan"), algorithm=AutoQ(2, warmup=1, agent=SMALL))
