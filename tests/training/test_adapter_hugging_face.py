"""The adapter for Hugging Face's Trainer, on the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.pruning import MovementPruner
from support.counting_compressor import Counting

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dwindle.training import Staged  # noqa: E402
from dwindle.training.adapters import follow_trainer  # noqa: E402


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Plain(nn.Module):
    """A model without keyword arguments for losses: the Trainer divides its loss by the accumulation itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(x).relu())
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else torch.zeros(())
        return {"loss": loss, "logits": logits}


def sentences(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": own, "labels": (own[0] > 20).long()} for own in tokens]


def points(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": own, "labels": (own[0] > 0).long()} for own in torch.randn(count, 4, generator=generator)]


def trainer_of(model: nn.Module, data: Any, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=0.01, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no", **{"save_strategy": "no", **options},
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("make", "data"), [(classifier, sentences), (Plain, points)])
def test_loss_parameters_and_steps(make: Any, data: Any, accumulation: int, tmp_path: Path) -> None:
    model = make()
    counting = Counting(model)
    with dw.compress(model, [counting]) as run:
        trainer = trainer_of(
            model, data(), tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=0.0
        )
        follow_trainer(trainer, run)
        trainer.train()
        asked = counting.losses
        trainer.evaluate()
    assert (counting.steps, run.steps) == (6, 6)
    assert counting.losses == asked == 6 * accumulation  # evaluation asks for none
    # The optimizer moves the parameter, the schedule takes its group along, and accumulated gradients are means:
    # that of strength * scale**2 is 2 * strength * scale at the first step, whatever the number of batches.
    assert float(counting.scale.detach()) < 1
    assert sum(counting.gradients[:accumulation]) == pytest.approx(1.0)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[-1] == rates[0]


def test_an_optimizer_that_was_given_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    class Own(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
            outputs = model(**inputs)
            return (outputs["loss"] * 3, outputs) if return_outputs else outputs["loss"] * 3

    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    counting = Counting(model)
    with dw.compress(model, [counting]) as run:
        arguments = trainer_of(model, points(), tmp_path).args
        trainer = Own(model=model, args=arguments, train_dataset=points(), optimizers=(optimizer, schedule))
        follow_trainer(trainer, run)
        trainer.train()
    assert counting.steps == 6
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)
    assert counting.gradients[0] == pytest.approx(1.0)


def pruned_training(folder: Path, stop: int | None, resume: bool, begin: int) -> dict[str, torch.Tensor]:
    """Train six steps with a movement pruner; or three and stop; or go on from the third."""
    model = classifier()
    config = [{"op_names_re": [".*dense"], "sparse_ratio": 0.5}]
    pruner = MovementPruner(model, config, training_steps=4, learning_rate=0.05)
    with dw.compress(model, [Staged(pruner, start=begin)]) as run:
        trainer = trainer_of(model, sentences(), folder, save_strategy="steps", save_steps=3)
        follow_trainer(trainer, run)
        if stop is not None:

            class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
                def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                    control.should_training_stop = state.global_step >= stop

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("begin", [0, 2])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, begin: int) -> None:
    whole = pruned_training(tmp_path / "whole", None, False, begin)
    pruned_training(tmp_path / "parts", 3, False, begin)
    resumed = pruned_training(tmp_path / "parts", None, True, begin)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    zeros = sum(int((value == 0).sum()) for name, value in whole.items() if "dense.weight" in name)
    assert zeros == sum(value.numel() for name, value in whole.items() if "dense.weight" in name) // 2


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    model = Plain()
    trainer = trainer_of(model, points(), tmp_path)
    run = dw.compress(model, [Counting(model)])
    with pytest.raises(ConfigError, match="enter the run first"):
        follow_trainer(trainer, run)
    other = Plain()
    with dw.compress(other, [Counting(other)]) as foreign, pytest.raises(ConfigError, match="not part of"):
        follow_trainer(trainer, foreign)
    with run:
        follow_trainer(trainer, run)
        with pytest.raises(ConfigError, match="follows a run already"):
            follow_trainer(trainer, run)


def test_a_checkpoint_without_compressors_is_refused(tmp_path: Path) -> None:
    trainer_of(Plain(), points(), tmp_path, save_strategy="steps", save_steps=3).train()
    model = Plain()
    counting = Counting(model)
    counting.parameters = lambda: iter(())  # type: ignore[method-assign]  # else torch misses a parameter group
    with dw.compress(model, [counting]) as run:
        trainer = trainer_of(model, points(), tmp_path)
        follow_trainer(trainer, run)
        with pytest.raises(FileFormatError, match="written without these compressors"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
