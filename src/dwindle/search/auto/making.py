"""From a candidate to a model: cut, trained with a teacher and with rounding in one run, ready to be exported."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller
from dwindle.quantization import QuantizationStages, TrainingQuantizer, quantize
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.variant import Workpiece, with_ranks
from dwindle.training import TrainingOptions, fit
from dwindle.training.loader_state import loader_state, restore_loader

__all__ = ["Shortened", "Training", "built", "integer_model", "trained"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Any, Any], Tensor]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with a learning rate of 1e-3, which small networks learn with."""
    return torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)


@dataclass(frozen=True)
class Training:
    """How candidates are trained. The learning rate rises over the first tenth of the steps, then falls to zero.

    Attributes:
        epochs: Passes over the data, of the chosen candidate.
        optimizer: Makes an optimizer of parameters, with the largest learning rate.
        teacher_weight: Weight of the original's answers beside the labels, 0 to 1.
        temperature: Of the distillation.
        quantize_at: The share of the training behind which layers are rounded: later is faster, and enough for many.
        method: How rounding is trained, see :class:`dwindle.quantization.TrainingQuantizer`.
        clip_norm: Largest norm of all gradients together, or None.
        cache: Keep the original's answers on the disk while the search runs: candidates ask for them again and again.
            Only for data without augmentation.
        share: Of the epochs, where one candidate alone is done again: that of a trial gives what the trial gave.
    """

    epochs: int = 10
    optimizer: MakeOptimizer = adamw
    teacher_weight: float = 0.7
    temperature: float = 4.0
    quantize_at: float = 0.0
    method: str = "lsq"
    clip_norm: float | None = None
    cache: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"training: epochs must be at least 1, not {self.epochs}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"training: share {self.share} is not above 0 and up to 1")
        if not 0 <= self.teacher_weight <= 1:
            raise ConfigError(f"training: teacher_weight {self.teacher_weight} is not between 0 and 1")
        if not 0 <= self.quantize_at < 1:
            raise ConfigError(f"training: quantize_at {self.quantize_at} is not from 0 on and below 1")


class Shortened:
    """The first batches of every pass over a loader.

    Args:
        loader: Gives batches.
        batches: How many of them.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __len__(self) -> int:
        return min(self.batches, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), self.batches)


class _Unlabelled:
    """Batches of inputs with a stand-in for the labels that nothing looks at."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.loader:
            yield batch, torch.zeros(())


def built(workpiece: Workpiece, candidate: Candidate, *, verify: bool = False) -> nn.Module:
    """Return the small float model of a candidate, with the weights of the original.

    Raises:
        ConfigError: The candidate names what the model does not have.
        RealizeError: A cut is not proven equal.
    """
    first = candidate.ranks if candidate.factorize_first else {}
    variant = workpiece.variant(candidate.blocks, first)
    model = copy.deepcopy(variant.model)
    if candidate.counts:
        counts = variant.space.from_names(candidate.counts)
        model = variant.cut(counts, candidate.importance, verify=verify)
    if candidate.ranks and not candidate.factorize_first:
        model = with_ranks(workpiece, model, candidate.ranks)
    return model.eval()


def trained(
    workpiece: Workpiece,
    candidate: Candidate,
    small: nn.Module,
    loader: Any,
    training: Training,
    *,
    epochs: int,
    loss: Loss | None,
    backend: str,
    seed: int = 0,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Train the small model of a candidate in place, with everything at once: teacher, labels, rounding.

    Args:
        workpiece: Has the original, which is the teacher.
        candidate: What it is a model of.
        small: From :func:`built`.
        loader: Batches as :func:`dwindle.training.fit` takes them; inputs alone where ``loss`` is None.
        training: How.
        epochs: Passes over the data.
        loss: ``loss(outputs, target)``; None trains by the teacher alone.
        backend: Where it will run, for the places of the rounding.
        seed: Of the random generators.
        after_epoch: Told of each finished epoch (from 1 on) and the model; what it raises ends the training.
        progress: Show a progress bar.

    Returns:
        The model; with quantizers on it where the candidate is int8.
    """
    steps = epochs * len(loader)
    weight = 1.0 if loss is None else training.teacher_weight
    compressors: list[Any] = []
    if candidate.numbers == "int8":
        start = int(candidate.quantize_at * steps)
        compressors.append(
            quantizer_of(workpiece, candidate, small, training, backend, QuantizationStages(start, start))
        )
    if weight > 0:
        compressors.append(
            Distiller(
                small,
                teacher=copy.deepcopy(workpiece.model),
                temperature=training.temperature,
                logits_weight=weight,
                cache=workpiece.answers if training.cache else None,
            )
        )
    optimizer = training.optimizer([own for own in small.parameters() if own.requires_grad])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rise_and_fall, steps))
    options = TrainingOptions(
        seed=seed, progress=progress, task_weight=1 - weight, clip_norm=training.clip_norm
    )
    epoch = itertools.count(1)

    def evaluate(model: nn.Module) -> float:
        if after_epoch is not None:
            after_epoch(next(epoch), model)
        return 0.0

    source = loader.loader if isinstance(loader, Shortened) else loader
    before = loader_state(source)
    try:
        fit(
            small,
            _Unlabelled(loader) if loss is None else loader,
            optimizer,
            epochs=epochs,
            loss=loss or _nothing,
            schedule=schedule,
            compressors=compressors,
            evaluate=evaluate,
            options=options,
            description=candidate.summary(),
        )
    finally:
        restore_loader(source, before)  # every candidate sees the same batches
    return small.eval()


def quantizer_of(
    workpiece: Workpiece,
    candidate: Candidate,
    small: nn.Module,
    training: Training,
    backend: str,
    stages: QuantizationStages | None = None,
) -> TrainingQuantizer:
    """Return what rounds the model of a candidate in training."""
    return TrainingQuantizer(
        small,
        candidate.config_list,
        calibration_data=workpiece.batches,
        method=training.method,
        backend=backend,
        stages=stages,
        example_inputs=workpiece.inputs if not workpiece.kwargs else workpiece.kwargs,
    )


def integer_model(
    workpiece: Workpiece,
    candidate: Candidate,
    small: nn.Module,
    backend: str,
    batches: Sequence[Any] | None = None,
) -> nn.Module:
    """Return the int8 model of a small float one, without training.

    Args:
        workpiece: Has the batches for ranges.
        candidate: Says which layers stay in float.
        small: From :func:`built`.
        backend: Where it will run.
        batches: Other batches for the ranges, such as one alone where only the time matters.
    """
    return quantize(
        small,
        workpiece.batches if batches is None else batches,
        config_list=candidate.config_list,
        backend=backend,
        example_inputs=workpiece.inputs if not workpiece.kwargs else workpiece.kwargs,
    )


def rise_and_fall(total: int, step: int) -> float:
    """Return the share of the largest learning rate at a step: up over the first tenth, then down to zero."""
    rising = max(1, total // 10)
    return (step + 1) / rising if step < rising else max(0.0, (total - step) / max(1, total - rising))


def _nothing(outputs: Any, target: Any) -> Tensor:
    return torch.zeros(())
