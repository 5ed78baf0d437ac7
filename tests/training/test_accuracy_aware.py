"""The search for the largest rate: against brute force, killed and resumed, honest where nothing satisfies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dwindle import pruning, simulate
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.training import AccuracyOptions, RateSearch, accuracy_aware, adapt_normalization, compress


def searched(satisfies: Callable[[float], bool], search: RateSearch) -> list[tuple[float, bool]]:
    tried: list[tuple[float, bool]] = []
    while (rate := search.next()) is not None:
        tried.append((rate, satisfies(rate)))
        search.tell(*tried[-1])
    return tried


@settings(max_examples=100, deadline=None)
@given(
    limit=st.floats(0.0, 1.2),
    step=st.floats(0.05, 0.5),
    share=st.floats(0.05, 1.0),
    largest=st.floats(0.5, 1.0),
)
def test_monotone_brute_force_agrees(limit: float, step: float, share: float, largest: float) -> None:
    search = RateSearch(step, step * share, largest=largest)
    tried = searched(lambda rate: rate <= limit, search)
    grid = [k / 2000 * largest for k in range(2001)]
    best = max(rate for rate in grid if rate <= limit)
    found = search.best or 0.0
    assert found <= min(limit, largest)
    assert best - found <= search.minimum_step + 1e-8
    assert len(tried) <= math.ceil(largest / step) + math.ceil(math.log2(1 / share)) + 1
    assert search.ended == ("the largest rate satisfies" if found == largest else "the step became small")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=50, max_size=50))
def test_what_is_found_satisfies_where_satisfying_is_not_monotone(verdicts: list[bool]) -> None:
    search = RateSearch(0.2, 0.03)
    tried = searched(lambda rate: verdicts[min(int(rate * 50), 49)], search)
    good = [rate for rate, satisfied in tried if satisfied]
    assert search.best == (good[-1] if good else None)
    assert good == sorted(good)
    if search.best != 1.0:
        assert search.failed is not None
        assert 0 < search.failed - (search.best or 0.0) <= 0.03 + 1e-8
        assert not verdicts[min(int(search.failed * 50), 49)]


def test_steps() -> None:
    tried = searched(lambda rate: rate < 0.36, RateSearch(0.1, 0.025))
    assert [round(rate, 9) for rate, _ in tried] == [0.1, 0.2, 0.3, 0.4, 0.35, 0.375]
    assert [satisfied for _, satisfied in tried] == [True, True, True, False, True, False]
    assert searched(lambda rate: True, RateSearch(0.4, largest=0.9)) == [
        (0.4, True),
        (0.8, True),
        (0.9, True),
    ]
    assert [rate for rate, _ in searched(lambda rate: False, RateSearch(0.4, 0.1))] == [0.4, 0.2, 0.1]


class Dial:
    """A compressor whose model's quality is known: a rate costs, epochs win some of it back."""

    def __init__(self, cost: Callable[[float], float]) -> None:
        self.model, self.cost = nn.Linear(1, 1), cost
        self.rate, self.trained = 0.0, 0
        self.loads = 0

    def update(self, rate: float) -> None:
        self.rate, self.trained = rate, 0

    def train(self, model: nn.Module) -> None:
        assert model is self.model
        self.trained += 1

    def metric(self, model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return 0.9 - self.cost(self.rate) * 0.5**self.trained

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate, self.trained = state["rate"], state["trained"]
        self.loads += 1


@pytest.mark.parametrize("drop", [0.0, 0.0111, 0.051, 0.2, 1.0])
@pytest.mark.parametrize("name", ["monotone", "hill"])
def test_brute_force_over_a_known_metric(name: str, drop: float) -> None:
    """A monotone cost, and one that falls again behind a hill."""
    costs = {"monotone": lambda rate: rate**2, "hill": lambda rate: math.sin(5 * rate) ** 2 * 0.4}
    dial = Dial(costs[name])
    options = AccuracyOptions(maximum_drop=drop, step=0.1, minimum_step=0.01, epochs=2)
    result = accuracy_aware(dial, train_epoch=dial.train, evaluate=dial.metric, options=options)
    within = [k / 1000 for k in range(1001) if costs[name](k / 1000) / 4 <= drop + 1e-12]
    first_out = next((k / 1000 for k in range(1001) if costs[name](k / 1000) / 4 > drop), None)
    assert result.baseline == 0.9
    assert result.bound == pytest.approx(0.9 - drop)
    if name == "monotone" or first_out is None:
        assert max(within) - result.rate <= 0.01 + 1e-3
    assert costs[name](result.rate) / 4 <= drop + 1e-9
    if result.satisfied:
        assert result.metric >= result.bound
        assert dial.rate == result.rate
        assert result.model is dial.model
    else:
        assert (result.rate, dial.rate, result.metric) == (0.0, 0.0, 0.9)
    for trial in result.trials:
        free = dial.cost(trial.rate) <= drop
        assert trial.satisfied == (dial.cost(trial.rate) / 4 <= drop + 1e-12)
        assert (trial.epochs == 0) == free
        assert trial.epochs <= 2


def test_smaller_is_better_relative_and_a_limit_of_epochs() -> None:
    dial = Dial(lambda rate: -rate)  # 0.9 grows
    options = AccuracyOptions(maximum_drop=0.5, relative=True, mode="min", epochs=0)
    result = accuracy_aware(dial, train_epoch=dial.train, evaluate=dial.metric, options=options, baseline=1.0)
    assert result.bound == 1.5
    assert result.rate == pytest.approx(0.6)
    assert all(trial.epochs == 0 for trial in result.trials)
    dial = Dial(lambda rate: rate)
    options = AccuracyOptions(maximum_drop=0.05, epochs=3, maximum_epochs=4)
    result = accuracy_aware(dial, train_epoch=dial.train, evaluate=dial.metric, options=options)
    assert sum(trial.epochs for trial in result.trials) == 4
    assert result.ended == "all epochs are used"
    assert "within the bound" in result.summary()


@pytest.mark.parametrize("go_back", [True, False])
@pytest.mark.parametrize("limit", [0.36, 0.37])
def test_training_may_go_on_where_a_rate_did_not_satisfy(limit: float, go_back: bool) -> None:
    """The last trial satisfies at one limit and does not at the other; the model ends in the best state anyway."""
    dial = Dial(lambda rate: float(rate > limit))
    options = AccuracyOptions(maximum_drop=0.1, minimum_step=0.0125, epochs=1, go_back=go_back)
    result = accuracy_aware(dial, train_epoch=dial.train, evaluate=dial.metric, options=options)
    failed = [trial for trial in result.trials if not trial.satisfied]
    assert dial.rate == result.rate == max(trial.rate for trial in result.trials if trial.satisfied)
    assert len(failed) >= 2
    assert dial.loads == (len(failed) if go_back else int(not result.trials[-1].satisfied))


def images(count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 1, 5, 5, generator=generator) + labels[:, None, None, None], labels


class Task:
    """A small classifier with dropout, AdamW, a shuffled loader and a pruner."""

    def __init__(self, kind: type[pruning.Pruner] = pruning.L1NormPruner, ratio: float = 0.9) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(72, 3)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.005)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        data = torch.utils.data.TensorDataset(*images())
        self.loader = torch.utils.data.DataLoader(
            data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(4):
            self.train(self.model)
        config = [{"op_names": ["0"], "sparse_ratio": ratio}]
        self.pruner = kind(self.model, config, example_inputs=(images()[0][:2],))
        self.calls = 0

    def train(self, model: nn.Module) -> None:
        model.train()
        for x, y in self.loader:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            self.optimizer.step()
        self.schedule.step()

    def evaluate(self, model: nn.Module) -> float:
        self.calls += 1
        x, y = images()
        return -float(nn.functional.cross_entropy(model(x), y).detach())

    def search(self, path: Path | None = None, killed_at: int | None = None, drop: float = 0.02) -> Any:
        def evaluate(model: nn.Module) -> float:
            if self.calls == killed_at:
                raise KeyboardInterrupt
            return self.evaluate(model)

        options = AccuracyOptions(maximum_drop=drop, step=0.25, minimum_step=0.1, epochs=2)
        return accuracy_aware(
            self.pruner,
            train_epoch=self.train,
            evaluate=evaluate,
            options=options,
            calibrate=lambda model: adapt_normalization(model, images()[0].split(32)),
            keep=[self.optimizer, self.schedule, self.loader],
            path=path,
        )


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return set(one) == set(two) and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(("kind", "ratio"), [(pruning.L1NormPruner, 0.9), (pruning.LevelPruner, 0.99)])
def test_killed_and_resumed_equals_uninterrupted(kind: Any, ratio: float, tmp_path: Path) -> None:
    whole = Task(kind, ratio)
    expected = whole.search()
    assert expected.satisfied
    assert {trial.satisfied for trial in expected.trials} == {True, False}
    assert any(trial.epochs for trial in expected.trials)
    assert expected.metric == pytest.approx(whole.evaluate(whole.model.eval()), abs=1e-6)
    assert expected.metric >= expected.bound
    for moment in range(1, whole.calls - 1, 2):
        path = tmp_path / f"{moment}" / "search"
        killed = Task(kind, ratio)
        with pytest.raises(KeyboardInterrupt):
            killed.search(path, killed_at=moment)
        resumed = Task(kind, ratio)
        result = resumed.search(path)
        assert [(own.rate, own.metric, own.epochs) for own in result.trials] == [
            (own.rate, own.metric, own.epochs) for own in expected.trials
        ]
        assert same(resumed.model, whole.model), moment
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
        assert len(list(path.parent.iterdir())) == 2
        again = Task(kind, ratio)
        assert again.search(path).rate == expected.rate
        assert again.calls == 0
        assert same(again.model, whole.model)


def test_inside_a_run_and_the_masks_are_those_of_the_best_rate() -> None:
    task = Task()
    before = [parameter for parameter in task.model.parameters()]
    with compress(task.model, [task.pruner]):
        result = task.search()
        mask = simulate.masks_as_nested(task.model)["0"]["bias"]
        assert int((mask == 0).sum()) == round(8 * 0.9 * result.rate)
    assert all(own is other for own, other in zip(before, task.model.parameters(), strict=True))
    assert int((task.model[0].bias == 0).sum()) == round(8 * 0.9 * result.rate)


def test_masks_that_come_only_at_higher_rates_go_when_it_steps_back() -> None:
    """Of four channels none goes at a low rate, so that the norm behind them gets its masks later than others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    )
    nn.init.uniform_(model[1].bias, 0.5, 1.0)
    x = images()[0][:8]
    pruner = pruning.L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 1.0}], example_inputs=(x,))
    given = model.eval()(x).detach()
    answers: dict[float, torch.Tensor] = {}

    def evaluate(own: nn.Module) -> float:
        rate = pruner.state_dict()["progress"]
        answers[rate] = own(x)
        return -rate

    options = AccuracyOptions(maximum_drop=0.125, step=0.125, minimum_step=0.125, epochs=0)
    result = accuracy_aware(pruner, train_epoch=lambda own: None, evaluate=evaluate, options=options)
    assert (result.rate, [trial.rate for trial in result.trials]) == (0.125, [0.125, 0.25])
    assert torch.equal(answers[0.0], given)
    assert torch.equal(model.eval()(x), answers[0.125])
    assert not torch.allclose(answers[0.125], answers[0.25])
    assert {str(target) for target in simulate.get_masks(model)} == set(pruner.state_dict()["masked"])


def test_where_no_rate_satisfies_the_model_is_as_it_was() -> None:
    task = Task()
    x = images()[0]
    given = task.model.eval()(x).detach()
    before = copy.deepcopy(task.model.state_dict())
    rate, kept = task.optimizer.param_groups[0]["lr"], copy.deepcopy(task.optimizer.state_dict()["state"])
    options = AccuracyOptions(maximum_drop=0.0, step=0.5, minimum_step=0.25, epochs=1)

    def untouched(model: nn.Module) -> float:
        masks = [mask for own in task.pruner.masks.values() for mask in own.values()]
        return float(all(bool((mask == 1).all()) for mask in masks))

    result = accuracy_aware(
        task.pruner,
        train_epoch=task.train,
        evaluate=untouched,
        options=options,
        keep=[task.optimizer, task.schedule],
    )
    assert not result.satisfied
    assert torch.equal(task.model.eval()(x), given)
    assert (result.rate, result.metric) == (0.0, 1.0)
    assert "no rate is within the bound" in result.summary()
    assert [trial.satisfied for trial in result.trials] == [False] * len(result.trials)
    assert all(torch.equal(task.model.state_dict()[key], value) for key, value in before.items())
    assert task.optimizer.param_groups[0]["lr"] == rate
    state = task.optimizer.state_dict()["state"]
    assert all(torch.equal(state[key]["exp_avg"], own["exp_avg"]) for key, own in kept.items())


def test_an_error_leaves_the_best_state() -> None:
    task = Task()
    trials = task.search().trials
    last = max(number for number, trial in enumerate(trials) if trial.satisfied)
    assert last < len(trials) - 1
    whole = Task()
    with pytest.raises(KeyboardInterrupt):  # in the trial behind the best one; 1 is the baseline's
        whole.search(killed_at=1 + sum(trial.epochs + 1 for trial in trials[: last + 1]))
    assert same(whole.model, task.model)
    broken = Task()
    before = copy.deepcopy(broken.model.state_dict())
    with pytest.raises(ZeroDivisionError):
        accuracy_aware(
            broken.pruner,
            train_epoch=broken.train,
            evaluate=lambda model: 1 / 0,
            options=AccuracyOptions(maximum_drop=0.1),
        )
    assert all(torch.equal(broken.model.state_dict()[key], value) for key, value in before.items())
    assert not simulate.simulated_targets(broken.model)


def halved(rate: float) -> nn.Module:
    """A model of its own for each rate: fewer hidden channels."""
    torch.manual_seed(3)
    wide = max(round(12 * (1 - rate)), 1)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, wide), nn.ReLU(), nn.Linear(wide, 3))


class Trained:
    def __init__(self) -> None:
        self.epochs = 0

    def train(self, model: nn.Module) -> None:
        self.epochs += 1
        if self.epochs == getattr(self, "killed_at", None):
            raise KeyboardInterrupt
        x, y = images()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y).backward()
            optimizer.step()

    @staticmethod
    def evaluate(model: nn.Module) -> float:
        x, y = images()
        return float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_new_model_for_each_rate(killed_at: int, tmp_path: Path) -> None:
    options = AccuracyOptions(maximum_drop=0.05, step=0.3, minimum_step=0.1, epochs=2)
    teacher = Trained()

    def search(own: Trained, path: Path | None = None) -> Any:
        return accuracy_aware(
            halved, train_epoch=own.train, evaluate=own.evaluate, options=options, baseline=0.95, path=path
        )

    expected = search(teacher)
    assert expected.satisfied
    assert expected.model[1].out_features == round(12 * (1 - expected.rate))
    assert teacher.evaluate(expected.model) == expected.metric >= 0.9
    killed = Trained()
    killed.killed_at = killed_at  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        search(killed, tmp_path / "search")
    result = search(Trained(), tmp_path / "search")
    assert same(result.model, expected.model)
    assert [own.metric for own in result.trials] == [own.metric for own in expected.trials]


def test_mistakes(tmp_path: Path) -> None:
    task = Task()

    def run(compressor: Any, options: AccuracyOptions | None = None, **more: Any) -> Any:
        options = options or AccuracyOptions(maximum_drop=0.1)
        return accuracy_aware(
            compressor, train_epoch=task.train, evaluate=task.evaluate, options=options, **more
        )

    with pytest.raises(ConfigError, match="LinearPruner, which has no update"):
        run(pruning.LinearPruner(task.pruner, 1, 2))
    with pytest.raises(ConfigError, match="keep goes with a model"):
        run(halved, keep=[task.optimizer])
    with pytest.raises(ConfigError, match="metric of the uncompressed model is nan"):
        run(halved, baseline=math.nan)
    with pytest.raises(ConfigError, match="did you mean 'max'"):
        AccuracyOptions(maximum_drop=0.1, mode="maxx")  # type: ignore[arg-type]
    for own in ({"maximum_drop": -1.0}, {"maximum_drop": math.inf}, {"maximum_drop": 0.1, "epochs": -1}):
        with pytest.raises(ConfigError):
            AccuracyOptions(**own)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="minimum_step"):
        run(task.pruner, AccuracyOptions(maximum_drop=0.1, minimum_step=0.2))
    with pytest.raises(ConfigError, match="first rate"):
        RateSearch(first=1.2)
    assert not simulate.simulated_targets(task.model)
    path = tmp_path / "search"
    options = AccuracyOptions(maximum_drop=5.0, step=1.0, epochs=0)
    run(task.pruner, options, path=path)
    with pytest.raises(FileFormatError, match="other options"):
        run(task.pruner, AccuracyOptions(maximum_drop=0.2), path=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FileFormatError):
        run(task.pruner, options, path=path)
