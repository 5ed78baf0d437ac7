"""AutoCompress: rounds of annealing, ADMM and a proven cut; the trained zeros are what goes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.pruning import ADMMPruner
from dwindle.search import AutoCompress, Problem, SimulatedAnnealing, run_search
from dwindle.search.auto_compress import _rank_zeros_last, config_of, round_share
from dwindle.training import TrainingOptions, fit
from dwindle.training.compressor import Compressor
from search.models import images, nearness, tiny

ANNEALING = SimulatedAnnealing(start_temperature=10, stop_temperature=8)


def training(model: nn.Module, epochs: int = 4):
    """Training toward the outputs of the whole model, four steps an epoch."""
    data = images()
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(data)
    batches = [(data[start : start + 4], wanted[start : start + 4]) for start in range(0, 16, 4)]

    def train(small: nn.Module, compressors: Sequence[Compressor]) -> None:
        optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
        fit(
            small,
            batches,
            optimizer,
            epochs=epochs,
            loss=nn.functional.mse_loss,
            compressors=compressors,
            options=TrainingOptions(clip_norm=1.0),
        )

    return train


def algorithm(model: nn.Module, **arguments) -> AutoCompress:
    settings = {"training_steps": 12, "interval_steps": 3, "rho": 0.1, "rounds": 2, "annealing": ANNEALING}
    return AutoCompress(training(model), **{**settings, **arguments})


def test_every_round_leaves_the_same_part() -> None:
    shares = [1.0, *(round_share(0.3, position, 4) for position in (1, 2, 3, 4))]
    assert shares[-1] == pytest.approx(0.3)
    assert [b / a for a, b in itertools.pairwise(shares)] == pytest.approx([0.3**0.25] * 4)


def test_admm_masks_as_many_channels_as_the_counts_say_and_they_are_cut() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    for counts in (
        {"stem.weight[0]": 5, "inner.weight[0]": 11, "wide.weight[0]": 19, "hidden.weight[0]": 7},
        {"stem.weight[0]": 8, "inner.weight[0]": 2, "wide.weight[0]": 23, "hidden.weight[0]": 16},
    ):
        masked = copy.deepcopy(model)
        config = config_of(problem, counts)
        pruner = ADMMPruner(masked, config, images(2), training_steps=2, interval_steps=1)
        training(model, epochs=1)(masked, [pruner])
        pruner.detach()
        kept = {
            name: masked.get_parameter(name.removesuffix("[0]")).flatten(1).abs().sum(1) > 0
            for name in counts
        }
        assert {name: int(alive.sum()) for name, alive in kept.items()} == counts
        trained = problem.of_round(masked, "trained")
        _rank_zeros_last(trained, counts)
        keep = trained.keep(trained.space.from_names(counts))
        for variable in trained.space.variables:
            if variable.axis in keep:
                assert torch.equal(keep[variable.axis], kept[variable.name])


def test_rounds_end_within_the_budget_with_proofs(tmp_path: Path) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    result = run_search(problem, algorithm(model), storage=tmp_path)
    whole = problem.cost.predicted(problem.space.full())
    assert len(result.proofs) == 2
    assert all(proof.proven for proof in result.proofs)
    assert result.best.cost <= 0.5 * whole
    halves = [trial for trial in result.trials if trial.base == ""]
    assert all(trial.cost <= 0.5**0.5 * whole for trial in halves)
    with torch.no_grad():
        assert nearness(model)(result.model) == pytest.approx(result.best.score, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert problem.limit == 0.5 * whole
    with pytest.raises(ConfigError, match=r"result\.model"):
        result.realize()
    again = AutoCompress(
        lambda small, compressors: pytest.fail("trained again"), 12, 3, rho=0.1, rounds=2, annealing=ANNEALING
    )
    resumed = run_search(problem, again, storage=tmp_path)
    assert torch.equal(resumed.model(images()), result.model(images()))
    assert resumed.to_json() == result.to_json()


def test_training_that_ends_early_is_refused() -> None:
    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    short = AutoCompress(training(model, epochs=1), 12, 3, rounds=1, annealing=ANNEALING)
    with pytest.warns(UserWarning, match="not final"), pytest.raises(ConfigError, match="4 of 12"):
        run_search(problem, short)
    for arguments in ({"rounds": 0}, {"interval_steps": 12}):
        with pytest.raises(ConfigError):
            algorithm(model, **arguments)
