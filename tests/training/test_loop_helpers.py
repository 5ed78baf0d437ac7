"""The loop of the house with early stop, adapted normalizations and faster compressors' parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle import pruning
from dwindle.config.errors import ConfigError
from dwindle.training import EarlyStop, LinearSchedule, Staged, TrainingOptions, adapt_normalization, fit
from support.counting_compressor import Counting


class Task:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)
        data = torch.utils.data.TensorDataset(x, y)
        self.loader = torch.utils.data.DataLoader(
            data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        self.told: list[float] = []

    def fit(self, metrics: list[float] | None, epochs: int = 9, **more: Any) -> Any:
        def evaluate(model: nn.Module) -> float:
            assert metrics is not None
            if len(self.told) >= len(metrics):
                raise KeyboardInterrupt
            self.told.append(metrics[len(self.told)])
            return self.told[-1]

        return fit(
            self.model,
            self.loader,
            self.optimizer,
            epochs=epochs,
            evaluate=None if metrics is None else evaluate,
            **more,
        )


METRICS = [0.5, 0.6, float("nan"), 0.55, 0.6, 0.7, 0.7, 0.7, 0.7]


def test_it_stops_and_a_resumed_one_stops_at_the_same_place(tmp_path: Path) -> None:
    whole = Task()
    expected = whole.fit(METRICS, early_stop=EarlyStop(2))
    assert len(expected.history) == 5  # an epoch that was not evaluated does not count
    assert expected.stopped == "patience"
    for moment in range(1, 5):
        path = tmp_path / str(moment)
        killed, resumed = Task(), Task()
        with pytest.raises(KeyboardInterrupt):
            killed.fit(METRICS[:moment], early_stop=EarlyStop(2), checkpoint=path)
        result = resumed.fit(METRICS[moment:], early_stop=EarlyStop(2), checkpoint=path)
        assert (len(result.history), result.stopped) == (5, "patience")
        state = resumed.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())
    again = Task()
    assert again.fit([], early_stop=EarlyStop(2), checkpoint=path).stopped == "patience"
    assert again.told == []
    assert Task().fit(METRICS).stopped is None


def test_epochs_are_judged_once_the_masks_stand() -> None:
    """Six steps an epoch: masks grow for three epochs, while the metric falls, and gains nothing afterwards."""
    falling = [0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    own = Task()
    pruner = pruning.LevelPruner(own.model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    scheduled = pruning.ScheduledPruner(pruner, LinearSchedule(0.0, 1.0, 18), 1)
    stop = EarlyStop(2)
    result = own.fit(falling, compressors=[scheduled], early_stop=stop)
    assert (len(result.history), stop.best) == (5, 0.7)
    staged = Task()
    stop = EarlyStop(2, target=0.85)
    result = staged.fit(
        falling, compressors=[Staged(Counting(staged.model), start=2, unit="epoch")], early_stop=stop
    )
    assert (len(result.history), stop.best, result.stopped) == (4, 0.8, "patience")


def test_without_evaluation_the_loss_is_judged() -> None:
    own = Task()
    result = own.fit(None, epochs=30, early_stop=EarlyStop(3, mode="min", target=1.0))
    assert result.stopped == "target"
    assert result.history[-1].loss <= 1.0 < result.history[-2].loss
    assert len(result.history) < 30


def test_statistics_are_those_of_the_loader_and_the_batches_are_the_same() -> None:
    plain, own = Task(), Task()
    seen: list[Any] = []
    plain.fit(None, epochs=2)
    own.fit(None, epochs=2, options=TrainingOptions(adapt_normalization=6))
    for (name, value), other in zip(
        own.model.named_parameters(), plain.model.parameters(), strict=True
    ):  # statistics take no part in training: the weights are the same to the last bit
        assert torch.equal(value, other), name
    assert not torch.equal(own.model[1].running_mean, plain.model[1].running_mean)
    reference = copy.deepcopy(own.model)
    adapt_normalization(reference, own.loader.dataset.tensors[0])
    torch.testing.assert_close(own.model[1].running_mean, reference[1].running_mean)
    torch.testing.assert_close(own.model[1].running_var, reference[1].running_var)
    evaluated = Task()
    fit(
        evaluated.model,
        evaluated.loader,
        evaluated.optimizer,
        epochs=2,
        evaluate=lambda model: seen.append(model[1].running_mean.clone()) or 0.0,
        options=TrainingOptions(adapt_normalization=6),
    )
    assert torch.equal(seen[-1], own.model[1].running_mean)


def test_the_factor_reaches_the_optimizer() -> None:
    own = Task()
    own.fit(None, epochs=1, compressors=[Counting(own.model)], options=TrainingOptions(compressor_rate=5.0))
    assert [group["lr"] for group in own.optimizer.param_groups] == pytest.approx([0.02, 0.1])
    with pytest.raises(ConfigError, match="compressor_rate"):
        TrainingOptions(compressor_rate=0.0)
    with pytest.raises(ConfigError, match="adapt_normalization"):
        TrainingOptions(adapt_normalization=-1)
