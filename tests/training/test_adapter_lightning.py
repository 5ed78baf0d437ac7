"""The adapter for Lightning, on the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.pruning import MovementPruner
from support.counting_compressor import Counting

pytest.importorskip("lightning")

import lightning.pytorch as lightning

from dwindle.training import Staged
from dwindle.training.adapters import CompressionCallback


class Module(lightning.LightningModule):
    """A small classifier; ``answer`` says what ``training_step`` returns."""

    def __init__(self, answer: str = "tensor", by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.answer, self.automatic_optimization = answer, not by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss)
        return {"tensor": loss, "dict": {"loss": loss, "more": 1}, "none": None, "list": [loss]}[self.answer]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(count: int = 32) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
        **{"enable_checkpointing": False, "max_steps": 6, **options},
    )  # fmt: skip


@pytest.mark.parametrize("answer", ["tensor", "dict"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_parameters_and_steps(answer: str, accumulation: int, tmp_path: Path) -> None:
    module = Module(answer)
    counting = Counting(module.model)
    with dw.compress(module.model, [counting]) as run:
        trainer = trainer_of(tmp_path, CompressionCallback(run), accumulate_grad_batches=accumulation)
        trainer.fit(module, batches(), batches())
    assert (counting.steps, run.steps) == (6, 6)
    assert counting.losses == 6 * accumulation
    assert sum(counting.gradients[:accumulation]) == pytest.approx(1.0)
    assert float(counting.scale.detach()) < 1
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[1] == rates[0] == pytest.approx(0.1 * 0.5**6)
    assert "training_step" not in vars(module)


def test_a_batch_that_is_skipped_has_no_loss_to_add_to(tmp_path: Path) -> None:
    module = Module("none")
    counting = Counting(module.model)
    with dw.compress(module.model, [counting]) as run:
        trainer_of(tmp_path, CompressionCallback(run), limit_train_batches=2, max_epochs=1).fit(
            module, batches()
        )
    assert counting.losses == 0


def pruned_training(
    folder: Path, epochs: int, checkpoint: Path | None, begin: int
) -> dict[str, torch.Tensor]:
    module = Module()
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    pruner = MovementPruner(module.model, config, training_steps=5, learning_rate=0.05)
    with dw.compress(module.model, [Staged(pruner, start=begin)]) as run:
        saving = lightning.callbacks.ModelCheckpoint(
            dirpath=folder, filename="{step}", every_n_epochs=1, save_top_k=-1
        )
        trainer = trainer_of(
            folder,
            CompressionCallback(run),
            saving,
            enable_checkpointing=True,
            max_steps=-1,
            max_epochs=epochs,
        )
        trainer.fit(module, batches(16), ckpt_path=checkpoint)  # four steps an epoch
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:MovementPruner")
@pytest.mark.parametrize("begin", [0, 3])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, begin: int) -> None:
    whole = pruned_training(tmp_path / "whole", 2, None, begin)
    pruned_training(tmp_path / "parts", 1, None, begin)
    resumed = pruned_training(tmp_path / "parts", 2, tmp_path / "parts" / "step=4.ckpt", begin)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert int((whole["model.0.weight"] == 0).sum()) == 16


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    by_hand, strange, module = Module(by_hand=True), Module("list"), Module()
    for own, message in ((by_hand, "optimizes by hand"), (strange, "training_step returned a list")):
        with dw.compress(own.model, [Counting(own.model)]) as run, pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, CompressionCallback(run)).fit(own, batches())
    outside = dw.compress(module.model, [Counting(module.model)])
    with pytest.raises(ConfigError, match="enter the run first"):
        trainer_of(tmp_path, CompressionCallback(outside)).fit(module, batches())
    foreign = pytest.raises(ConfigError, match="not part of the Lightning module")
    with dw.compress(strange.model, [Counting(strange.model)]) as run, foreign:
        trainer_of(tmp_path, CompressionCallback(run)).fit(module, batches())
