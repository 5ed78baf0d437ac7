"""A training that is killed at any step and taken up again ends with the same bits, whatever compresses it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.distillation import Distiller
from dwindle.pruning import AGPPruner, L1NormPruner, MovementPruner, TaylorPruner
from dwindle.quantization import QuantizationStages, TrainingQuantizer
from dwindle.training import Staged, TrainingOptions, fit

STEPS, EPOCHS = 6, 4


class Killed(Exception):
    """Stands for the signal: nothing but the checkpoint is left afterwards."""


class Deadly:
    """A compressor that ends everything at one step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise Killed

    def loss(self) -> float:
        return 0.0

    def parameters(self):
        yield from ()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def loader() -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(STEPS * 4, 1, 6, 6, generator=generator), torch.arange(STEPS * 4) % 3
    data = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)  # shuffled by the global generator


CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def everything(model: nn.Module) -> list[Any]:
    """Taylor pruning on a schedule, rounding that begins later, and a teacher that stops."""
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    teacher = copy.deepcopy(model)
    taylor = TaylorPruner(model, CONV, example_inputs=(x,))
    quantizer = TrainingQuantizer(
        model, calibration_data=[x], method="lsq", stages=QuantizationStages(weights=2, activations=4)
    )
    return [
        AGPPruner(taylor, interval_steps=3, total_times=4),
        Staged(quantizer, start=1, unit="epoch"),
        Staged(Distiller(model, teacher=teacher), stop=15),
    ]


def scores(model: nn.Module) -> list[Any]:
    """Trained scores that begin in the second epoch, beside another mask."""
    first = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    second = [{"op_names": ["4", "9"], "sparse_ratio": 0.5}]
    later = Staged(MovementPruner(model, second, training_steps=9), start=5)
    return [later, L1NormPruner(model, first)]


def train(
    compressors: Any, checkpoint: Path | None, kill_at: int = 0, accumulate: int = 1, every: int = 1
) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS * EPOCHS)
    made = [*compressors(model), Deadly(kill_at)]
    result = fit(
        model, loader(), optimizer, epochs=EPOCHS, schedule=schedule, compressors=made,
        options=TrainingOptions(accumulate=accumulate, seed=3),
        checkpoint=checkpoint, checkpoint_every=None if checkpoint is None else every,
    )  # fmt: skip
    return result, model.state_dict()


@pytest.mark.parametrize("compressors", [everything, scores])
@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 2)])
def test_killed_at_random_steps(tmp_path, compressors, accumulate, every):
    reference, weights = train(compressors, None, accumulate=accumulate)
    last = STEPS * EPOCHS // accumulate
    steps = sorted(random.Random(0).sample(range(1, last + 1), min(10, last)))
    path = tmp_path / "state"
    for step in steps:
        with pytest.raises(Killed):
            train(compressors, path, step, accumulate, every)
        if step > every:
            assert path.exists()
    result, resumed = train(compressors, path, 0, accumulate, every)
    assert result.losses == reference.losses
    assert [record.loss for record in result.history] == [record.loss for record in reference.history]
    assert list(resumed) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name
