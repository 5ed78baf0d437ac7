"""Brings the user's data into one form: training batches, test batches, calibration inputs.

What a data callable may return:

* an object with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (the zoo's data sets);
* an object or mapping with ``train``, ``test`` and, if it likes, ``calibration`` and ``validation``. Each is a loader
  (anything that can be iterated several times), a pair ``(inputs, targets)`` of tensors, or a tensor of inputs alone;
* a tensor of inputs alone. There are no labels then, and agreement with the original stands in for accuracy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.recipe.model_source import call_checked, import_callable
from dwindle.recipe.schema import DataPart
from dwindle.training import seed_everything
from dwindle.training.batches import split_batch

__all__ = ["Batch", "Data", "TensorLoader", "load_data"]

#: Batches of inputs that a search without labels works with.
_UNLABELLED = 16

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Batch:
    """One test batch.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        target: Labels, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any


class TensorLoader:
    """Iterates over tensors in memory; order and augmentation depend on the seed and the pass alone.

    Args:
        inputs: Shape ``(n, ...)``.
        targets: Shape ``(n, ...)``.
        batch_size: Samples a batch.
        seed: Decides order and augmentation.
        augment: Called with ``(inputs, generator)`` on each batch.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int = 0, augment: Augment | None = None
    ):
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.seed, self.augment, self.passes = seed, augment, 0

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.passes) % 2**63)
        self.passes += 1
        for chosen in torch.randperm(len(self.inputs), generator=generator).split(self.batch_size):
            inputs = self.inputs[chosen]
            yield (inputs if self.augment is None else self.augment(inputs, generator)), self.targets[chosen]

    def state_dict(self) -> dict[str, int]:
        """Return how many passes were begun."""
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the loader that gave ``state`` was."""
        self.passes = int(state["passes"])


class Data:
    """The data of a recipe in one form.

    Args:
        part: The recipe's ``data``.
        train: A loader, a pair of tensors, or None.
        test: A loader, a pair of tensors, or a tensor.
        calibration: The same, or None: the training data serve.
        validation: The same, or None: some of the training data serve.
    """

    def __init__(self, part: DataPart, train: Any, test: Any, calibration: Any, validation: Any = None):
        self.part, self._train, self._test = part, train, test
        self._validation = validation
        self._calibration = calibration
        self._augment: Augment | None = None
        if part.augment is not None:
            self._augment = partial(import_callable(part.augment, "augment"), **part.augment_arguments)
            if not _is_pair(train):
                raise ConfigError("data.augment needs training data that come as a pair of tensors")

    @property
    def can_train(self) -> bool:
        """Whether there are training data."""
        return self._train is not None

    def training_batches(self, seed: int, batch_size: int | None = None) -> Iterable[Any]:
        """Return a loader of ``(inputs, target)`` batches in an order that ``seed`` decides.

        Raises:
            ConfigError: There are no training data.
        """
        if self._train is None:
            raise ConfigError(f"the data {self.part.name!r} hold nothing to train with")
        if not _is_pair(self._train):
            _seed_loader(self._train, seed)
            return self._train
        inputs, targets = self._train
        return TensorLoader(inputs, targets, batch_size or self.part.batch_size, seed, self._augment)

    def with_validation(self, share: float, seed: int, *, labelled: bool) -> tuple[Iterable[Any], list[Any]]:
        """Return training batches, and batches to judge by that are not among them.

        Args:
            share: Of the training data that is held out, where the data bring no validation data.
            seed: Decides the order of the training batches.
            labelled: Whether batches are ``(inputs, target)``; otherwise inputs alone.

        Raises:
            ConfigError: There are no training data, or no validation data and nothing to hold out.
        """
        if not labelled:
            inputs = self.calibration_inputs(_UNLABELLED)
            held = max(1, round(len(inputs) * share))
            if held >= len(inputs):
                raise ConfigError(
                    f"the data {self.part.name!r} give {len(inputs)} batch(es) of inputs: too few to hold some out"
                )
            return inputs[:-held], inputs[-held:]
        if self._train is None:
            raise ConfigError(f"the data {self.part.name!r} hold nothing to train with")
        if self._validation is not None:
            own = _batches(self._validation, self.part.evaluation_batch_size)
            return self.training_batches(seed), [(batch.kwargs or batch.args, batch.target) for batch in own]
        kept, held_out = _split(self._train, share, self.part.name)
        left = TensorLoader(kept[0], kept[1], self.part.batch_size, seed, self._augment)
        size = self.part.evaluation_batch_size
        return left, list(zip(held_out[0].split(size), held_out[1].split(size), strict=True))

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test data in their order."""
        yield from _batches(self._test, self.part.evaluation_batch_size)

    def calibration_inputs(self, batches: int) -> list[tuple[Any, ...] | dict[str, Any]]:
        """Return the inputs of the first ``batches`` calibration batches, never augmented.

        Returns:
            One entry a batch: a tuple of positional inputs, or a dict of keyword inputs.
        """
        source = self._calibration if self._calibration is not None else self._train
        if source is None:
            source = self._test
        if not isinstance(source, Tensor) and not _is_pair(source):
            _seed_loader(source, 0)
        found = itertools.islice(_batches(source, self.part.batch_size), batches)
        return [batch.kwargs if batch.kwargs else batch.args for batch in found]

    def example(self, batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword inputs of the first ``batch_size`` test samples."""
        first = next(iter(_batches(self._test, max(batch_size, 1))))
        args = tuple(_cut(value, batch_size) for value in first.args)
        return args, {key: _cut(value, batch_size) for key, value in first.kwargs.items()}


def load_data(part: DataPart) -> Data:
    """Call the recipe's data callable and bring what it gives into one form.

    Raises:
        ConfigError: The callable does not exist, or gives something else.
        MissingDependencyError: It needs a library that is not installed.
    """
    found = call_checked(import_callable(part.name, "data"), part.arguments, part.name)
    train, test, calibration = _parts(found, part.name)
    if part.limit is not None and _is_pair(train):
        train = tuple(tensor[: part.limit] for tensor in train)
    if part.test_limit is not None:
        if isinstance(test, Tensor):
            test = test[: part.test_limit]
        elif _is_pair(test):
            test = tuple(tensor[: part.test_limit] for tensor in test)
    train, test = _held_out(part, found, train, test)
    if part.calibration is not None:
        name = part.calibration.name
        own = call_checked(import_callable(name, "calibration data"), part.calibration.arguments, name)
        inner_train, inner_test, calibration = _parts(own, name)
        calibration = calibration if calibration is not None else inner_train
        calibration = calibration if calibration is not None else inner_test
    own = found.get("validation") if isinstance(found, Mapping) else getattr(found, "validation", None)
    return Data(part, train, test, calibration, own)


def _parts(found: Any, name: str) -> tuple[Any, Any, Any]:
    """Training, test and calibration data in what a callable returned."""
    if isinstance(found, Tensor):
        return None, found, None
    if hasattr(found, "train_images"):
        train = (found.train_images, found.train_labels)
        return train, (found.test_images, found.test_labels), None

    def get(key: str) -> Any:
        return found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)

    test = get("test")
    if test is None:
        raise ConfigError(
            f"the data {name!r} gave a {type(found).__name__}; it must be a tensor of inputs, or have 'test' (and "
            "'train' and 'calibration' where needed): loaders, pairs of tensors, or tensors"
        )
    return get("train"), test, get("calibration")


def _held_out(part: DataPart, found: Any, train: Any, test: Any) -> tuple[Any, Any]:
    """Training data without those that are held out, and what models are scored on."""
    own = found.get("validation") if isinstance(found, Mapping) else getattr(found, "validation", None)
    if own is not None:
        return train, test if part.evaluation == "test" else own
    if part.validation is None:
        if part.evaluation == "test":
            return train, test
        raise ConfigError(
            f"data.evaluation: the data {part.name!r} bring no 'validation'; say which share of the training data "
            "is held out: validation: 0.2"
        )
    kept, held = _split(train, part.validation, part.name)
    return kept, test if part.evaluation == "test" else held


def _split(train: Any, share: float, name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training data without those that are held out, and those; the same samples in every run."""
    if not _is_pair(train):
        raise ConfigError(
            f"data.validation: the training data of {name!r} do not come as a pair of tensors, of which some "
            "could be held out; let the data bring 'validation' themselves, or score on the test data"
        )
    count = len(train[0])
    held = round(count * share)
    if not 0 < held < count:
        raise ConfigError(f"data.validation: {share} of {count} training samples leaves one side empty")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rest = order[held:].sort().values
    return (train[0][rest], train[1][rest]), (train[0][order[:held]], train[1][order[:held]])


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)


def _batches(source: Any, batch_size: int) -> Iterator[Batch]:
    if isinstance(source, Tensor):
        for inputs in source.split(batch_size):
            yield Batch((inputs,), {}, None)
    elif _is_pair(source):
        inputs, targets = source
        for some, labels in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            yield Batch((some,), {}, labels)
    else:
        for batch in source:
            if isinstance(batch, Tensor):
                yield Batch((batch,), {}, None)
            elif isinstance(batch, Mapping) and not {"labels", "label"} & set(batch):
                yield Batch((), dict(batch), None)
            else:
                yield Batch(*split_batch(batch))


def _seed_loader(loader: Any, seed: int) -> None:
    """Make the order of a user's own loader depend on ``seed`` alone."""
    seed_everything(seed)
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _cut(value: Any, size: int) -> Any:
    return value[:size] if isinstance(value, Tensor) and value.dim() else value
