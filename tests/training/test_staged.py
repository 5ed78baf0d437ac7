"""Compressors that begin later or end sooner, and those that cannot go together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller
from dwindle.factorization import LowRankTraining
from dwindle.pruning import AGPPruner, L1NormPruner, LevelPruner, MovementPruner
from dwindle.quantization import BinaryQuantizer, TrainingQuantizer
from dwindle.training import Staged, compress, fit
from support.counting_compressor import Counting

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def train(run, model, optimizer, steps: int) -> None:
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), torch.arange(8) % 3) + run.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


def test_it_acts_between_its_steps_and_its_parameters_are_trained_only_then():
    model = network()
    counting = Counting(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with compress(model, [Staged(counting, start=2, stop=5)]) as run:
        assert run.add_parameters_to(optimizer, lr=0.01) == 0
        train(run, model, optimizer, 2)
        assert (counting.steps, counting.losses, len(optimizer.param_groups)) == (0, 0, 2)
        assert float(counting.scale.detach()) == 1.0
        assert optimizer.param_groups[1]["lr"] == 0.01
        train(run, model, optimizer, 3)
        assert (counting.steps, counting.losses) == (3, 3)
        moved = float(counting.scale.detach())
        assert moved < 1.0
        train(run, model, optimizer, 2)
        assert (counting.steps, counting.losses) == (3, 3)
        assert float(counting.scale.detach()) == moved


def test_masks_come_at_the_start_and_stand_after_the_stop():
    model = network()
    pruner = MovementPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with compress(model, [Staged(pruner, start=1, stop=6)]) as run:
        run.add_parameters_to(optimizer)
        assert not simulate.get_masks(model)
        assert run.statistics() == [{"name": "MovementPruner", "acts": 0.0}]
        train(run, model, optimizer, 6)
        assert pruner.finished
        mask = simulate.get_masks(model)[Target("0", "weight")].clone()
        assert float(mask.mean()) == 0.5
        train(run, model, optimizer, 3)
        assert torch.equal(simulate.get_masks(model)[Target("0", "weight")], mask)
        assert run.statistics()[0]["sparsity"] == 0.5
    assert float((model[0].weight == 0).float().mean()) == 0.5


def test_a_teacher_that_stops_is_asked_no_more():
    model = network()
    teacher = copy.deepcopy(model)
    asked = []
    teacher.register_forward_hook(lambda *call: asked.append(1))
    with compress(model, [Staged(Distiller(model, teacher=teacher), stop=2)]) as run:
        train(run, model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
        assert not model._forward_hooks
        assert "loss" not in run.statistics()[0]
    assert len(asked) == 2


def test_epochs_are_counted_by_the_loop_or_said():
    model = network()
    data = torch.utils.data.TensorDataset(X, torch.arange(8) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    counting = Counting(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, loader, optimizer, epochs=3, compressors=[Staged(counting, start=1, stop=2, unit="epoch")])
    assert counting.steps == 4
    staged = Staged(Counting(model), start=1, unit="epoch")
    with pytest.raises(ConfigError, match="steps_per_epoch=len"), compress(model, [staged]):
        pass
    assert Staged(Counting(model), start=2, stop=3, unit="step").window == (2, 3)
    with compress(model, [staged], steps_per_epoch=7) as run:
        assert staged.window == (7, None)
        train(run, model, optimizer, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3, "stop": 3}, "stop: 3 is not behind start: 3"),
        ({"start": -1}, "start: -1 is not a number of steps"),
        ({"unit": "epochs"}, "did you mean 'epoch'"),
    ],
)
def test_windows_that_are_none(options, message):
    with pytest.raises(ConfigError, match=message):
        Staged(Counting(network()), **options)


def level(model, *names, ratio=0.5):
    return LevelPruner(model, [{"op_names": list(names), "sparse_ratio": ratio}])


def binary(model, name):
    targets = ["weight", "_input_0"]
    return BinaryQuantizer(
        model, [{"op_names": [name], "target_names": targets, "quant_dtype": "int1"}], activations="bnn"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: [level(m, "0"), L1NormPruner(m, [{"op_names": ["0"], "sparse_ratio": 0.5}])],
            r"0\.weight: compressors\[0\] \(LevelPruner\) and compressors\[1\] \(L1NormPruner\) both mask it",
        ),
        (
            lambda m: [AGPPruner(level(m, "0", "2"), 2, 2), Staged(level(m, "2"), start=3)],
            r"2\.weight: .*LevelPruner.* both mask it",
        ),
        (
            lambda m: [TrainingQuantizer(m, calibration_data=[X]), binary(m, "2")],
            r"2\.weight: .*TrainingQuantizer.*BinaryQuantizer.* both round it",
        ),
        (
            lambda m: [
                LowRankTraining(m, [{"op_names": ["2"], "rank": 2}], example_inputs=(X,), training_steps=3),
                TrainingQuantizer(m, calibration_data=[X]),
            ],
            r"2\.weight: .*the weight that one rounds will vanish.*quantize after run\.realize",
        ),
        (
            lambda m: [
                level(m, "2"),
                LowRankTraining(m, [{"op_names": ["2"], "rank": 2}], example_inputs=(X,), training_steps=3),
            ],
            r"2\.weight: .*low rank no more. Mask whole channels",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_changes(make, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        compress(model, make(model))
    assert not simulate.simulated_targets(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_one_mask_may_follow_another_and_channels_go_with_low_rank():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Staged(level(model, "0"), stop=2), Staged(level(model, "0", ratio=0.75), start=2)
    with compress(model, [first, second]) as run:
        train(run, model, optimizer, 1)
        early = simulate.get_masks(model)[Target("0", "weight")].clone()
        train(run, model, optimizer, 2)
        late = simulate.get_masks(model)[Target("0", "weight")].clone()
    assert float(early.mean()) == 0.5
    assert float(late.mean()) == 0.25
    assert bool((late <= early).all())
    channels = L1NormPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.5}])
    ranks = LowRankTraining(model, [{"op_names": ["2"], "rank": 2}], example_inputs=(X,), training_steps=3)
    compress(model, [channels, ranks])
