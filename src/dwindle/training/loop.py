"""A plain PyTorch loop to train, fine-tune and evaluate; ``dwindle run`` uses it, anyone may.

It is deterministic for a given seed, and a run that was killed goes on after its last finished epoch (or step, where
that was kept) with results that are equal bit by bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError, FileFormatError
from dwindle.training.batches import logits_of, move_batch, split_batch
from dwindle.training.checkpoint import load_state, random_state, restore_random_state, save_state
from dwindle.training.compressor import Compressor
from dwindle.training.early_stop import EarlyStop, is_ready
from dwindle.training.loader_state import loader_state, restore_loader
from dwindle.training.loop_options import PRECISIONS, EpochRecord, TrainingOptions, TrainingResult
from dwindle.training.normalization_statistics import adapt_normalization
from dwindle.training.run import CompressionRun, compress
from dwindle.training.safety import safe_convolutions

__all__ = ["EpochRecord", "TrainingOptions", "TrainingResult", "fit", "seed_everything"]

Loss = Callable[[Any, Any], Tensor]


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    loss: Loss = nn.functional.cross_entropy,
    schedule: Any | None = None,
    compressors: Sequence[Compressor] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    options: TrainingOptions | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    early_stop: EarlyStop | None = None,
    description: str = "training",
) -> TrainingResult:
    """Train a model, with or without compressors, and go on where a killed run stood.

    Args:
        model: Trained in place; ends in evaluation mode when ``evaluate`` is given, else in training mode.
        loader: Yields ``(inputs, target)`` (inputs may be a tuple), or a mapping with the key ``labels`` or
            ``label`` and keyword inputs. A loader with ``state_dict`` is saved and restored with the run.
        optimizer: Holds the model's parameters; compressors' own parameters are added to it (beside SGD, logits of
            masks get Adam: :meth:`CompressionRun.adaptive_optimizer`).
        epochs: Passes over the loader.
        loss: ``loss(outputs, target) -> 0-d tensor``; outputs are logits (``.logits`` where a model gives a
            mapping or an output object).
        schedule: A learning rate scheduler of torch, or anything with ``step``, ``state_dict`` and
            ``load_state_dict``.
        compressors: Attached for the run, see :func:`dwindle.training.compress`.
        evaluate: Called with the model after each epoch, in evaluation mode and without gradients.
        options: Everything else.
        checkpoint: A file that keeps the whole state after each epoch. When it exists the run goes on from
            it; the same call as before then gives the same model as an uninterrupted run.
        checkpoint_every: Keep the state after every so many optimizer steps, too. What the loader had given in the
            unfinished epoch is then read again and passed over.
        early_stop: Ends the training when the metric (without ``evaluate``, the mean loss) gains no more, or is as good
            as asked for. While a compressor is on its way (its masks still grow) epochs are not judged.
        description: Stands beside the progress bar.

    Raises:
        ConfigError: An argument is not valid.
        DwindleError: The loss became infinite or not a number.
        FileFormatError: The checkpoint is damaged or belongs to another run.
    """
    options = options or TrainingOptions()
    if epochs < 0:
        raise ConfigError(f"epochs must not be negative, got {epochs}")
    if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
        raise ConfigError("checkpoint_every: a number of steps from 1 on, together with a checkpoint file")
    steps = math.ceil(len(loader) / options.accumulate) if isinstance(loader, Sized) else None
    _place(model, options)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(compress(model, compressors, steps_per_epoch=steps or None))
        apart = run.adaptive_optimizer(optimizer, multiplier=options.compressor_rate)
        run.add_parameters_to(optimizer, schedule=schedule, multiplier=options.compressor_rate)
        stack.enter_context(safe_convolutions(model, _device_of(model, options)))
        path = Path(checkpoint) if checkpoint is not None else None
        optimizers = [optimizer, *([apart] if apart else [])]
        state = _Loop(model, loader, optimizers, loss, schedule, run, options, path, checkpoint_every)
        state.early_stop = early_stop
        if options.seed is not None:
            seed_everything(options.seed)
        if path is not None and path.exists():
            state.resume(path, epochs)
        result = state.result
        advance = stack.enter_context(_progress(description, loader, epochs, result.resumed_from, options))
        for epoch in range(result.resumed_from + 1, epochs + 1):
            if early_stop is not None and early_stop.stopped:
                break
            begin = time.perf_counter()
            mean_loss = state.epoch(advance)
            state.adapt_normalization()
            metric = _evaluate(model, evaluate)
            rate = float(optimizer.param_groups[0]["lr"])
            result.history.append(EpochRecord(epoch, mean_loss, metric, rate, time.perf_counter() - begin))
            state.judge(result.history[-1])
            state.save()
    return result


class _Loop:
    """Everything that moves while a model is trained, and how it is saved."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Loss,
        schedule: Any | None,
        run: CompressionRun,
        options: TrainingOptions,
        path: Path | None = None,
        every: int | None = None,
    ):
        self.model, self.loader, self.optimizers, self.loss = model, loader, optimizers, loss
        self.schedule, self.run, self.options = schedule, run, options
        self.path, self.every = path, every
        self.early_stop: EarlyStop | None = None
        self.result = TrainingResult()
        self._unfinished: dict[str, Any] | None = None
        self.device = _device_of(model, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")

    def epoch(self, advance: Callable[[float], None]) -> float:
        """Train one pass over the loader; return the mean loss. An epoch that was broken off is gone on with."""
        self.model.train()
        self._zero_gradients()
        begin, self._unfinished = self._unfinished, None
        losses = self.result.losses
        if begin is None:
            done = 0
            begin = {"loader": loader_state(self.loader), "random": random_state()}
        else:
            done = begin["batches"]
        batches, first = 0, len(losses) - done
        for batch in self.loader:
            if batches < done:
                batches += 1
                if batches == done:
                    restore_random_state(begin["now"])
                advance(losses[first + batches - 1])
                continue
            value = self._backward(batch)
            if not math.isfinite(value) and not self.scaler.is_enabled():
                raise DwindleError(
                    f"the loss became {value} in batch {batches + 1}; try a lower learning rate or clip_norm"
                )
            losses.append(value)
            batches += 1
            if batches % self.options.accumulate == 0:
                self._step()
                if self.every is not None and batches // self.options.accumulate % self.every == 0:
                    self.save({**begin, "batches": batches, "now": random_state()})
            advance(value)
        if batches == 0:
            raise ConfigError("the loader gave no batch")
        if batches % self.options.accumulate:
            self._step()
        if self.schedule is not None and self.options.schedule_every == "epoch":
            self.schedule.step()
        return sum(losses[first:]) / batches

    def _backward(self, batch: Any) -> float:
        moved = move_batch(batch, self.device, channels_last=self.options.channels_last)
        args, kwargs, target = split_batch(moved)
        kind = PRECISIONS[self.options.precision]
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            outputs = logits_of(self.model(*args, **kwargs))
            value = self.options.task_weight * self.loss(outputs, target)
            value = value + self.run.loss()
        self.scaler.scale(value / self.options.accumulate).backward()
        return float(value.detach())

    def _step(self) -> None:
        if self.options.clip_norm is not None:
            self.scaler.unscale_(self.optimizers[0])
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        scale = self.scaler.get_scale()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._zero_gradients()
        if self.scaler.get_scale() < scale:
            return  # The gradients overflowed and the optimizer skipped this step, so nobody is told.
        self.run.step()
        if self.schedule is not None and self.options.schedule_every == "step":
            self.schedule.step()

    def adapt_normalization(self) -> None:
        """Estimate running statistics anew, if that is wanted; the loader goes on as if it had not been read."""
        if not self.options.adapt_normalization:
            return

        def inputs(batch: Any) -> Any:
            args, kwargs, _ = split_batch(batch)
            return kwargs or args

        before = loader_state(self.loader)
        adapt_normalization(self.model, self.loader, batches=self.options.adapt_normalization, adapt=inputs)
        restore_loader(self.loader, before)

    def judge(self, record: EpochRecord) -> None:
        """Ask whether to stop after an epoch; one that was not evaluated (a metric that is NaN) is passed over."""
        value = record.loss if record.metric is None else record.metric
        if self.early_stop is None or math.isnan(value):
            return
        if self.early_stop.report(value, ready=all(map(is_ready, self.run.compressors))):
            self.result.stopped = self.early_stop.reason

    def _zero_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def save(self, unfinished: dict[str, Any] | None = None) -> None:
        """Write the state after an epoch, or in the middle of one, atomically.

        Args:
            unfinished: Of an epoch that goes on: the state in which it began, its batches so far, and the random
                generators as they are now.
        """
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "history": [asdict(record) for record in self.result.history],
            "losses": torch.tensor(self.result.losses, dtype=torch.float64),
            "unfinished": unfinished,
            "model": dict(self.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "run": self.run.state_dict(),
            "scaler": self.scaler.state_dict(),
            "early_stop": None if self.early_stop is None else self.early_stop.state_dict(),
            "loader": loader_state(self.loader),
            "random": random_state(),
        }
        save_state(state, self.path)

    def resume(self, path: Path, epochs: int) -> None:
        """Take over the state in ``path``."""
        state = load_state(path)
        try:
            history = [EpochRecord(**record) for record in state["history"]]
            if len(history) > epochs:
                raise FileFormatError(
                    f"{path} is the state after {len(history)} epochs, but only {epochs} are asked for; "
                    "remove it to begin anew"
                )
            self.run.load_state_dict(state["run"])
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            if self.early_stop is not None and state.get("early_stop") is not None:
                self.early_stop.load_state_dict(state["early_stop"])
            unfinished = state.get("unfinished")
            restore_loader(self.loader, (unfinished or state)["loader"])
            restore_random_state((unfinished or state)["random"])
            losses = state["losses"].tolist()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path} does not belong to this run: {error}") from error
        stopped = None if self.early_stop is None else self.early_stop.reason
        self.result = TrainingResult(history, resumed_from=len(history), losses=losses, stopped=stopped)
        self._unfinished = unfinished


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _place(model: nn.Module, options: TrainingOptions) -> None:
    if options.device is not None:
        model.to(options.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _device_of(model: nn.Module, options: TrainingOptions) -> torch.device:
    if options.device is not None:
        return torch.device(options.device)
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    if evaluate is None:
        return None
    model.eval()
    with torch.no_grad():
        return float(evaluate(model))


@contextlib.contextmanager
def _progress(
    description: str, loader: Iterable[Any], epochs: int, done: int, options: TrainingOptions
) -> Iterator[Callable[[float], None]]:
    """Give a function to be called after each batch; it draws a bar, or does nothing."""
    shown = sys.stderr.isatty() if options.progress is None else options.progress
    if not shown:
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    batches = len(loader) if isinstance(loader, Sized) else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(
            description,
            total=None if batches is None else batches * epochs,
            completed=0 if batches is None else batches * done,
            loss=math.nan,
        )
        yield lambda loss: bar.update(task, advance=1, loss=loss)
