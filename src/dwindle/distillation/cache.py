"""A teacher's answers on disk: each sample is asked once, whatever batch it stands in, and never again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.distillation.answer_store import AnswerStore, Row, stacked
from dwindle.distillation.fingerprints import content_keys, model_fingerprint, versions_of
from dwindle.distillation.recording import tensors_in
from dwindle.distillation.teacher import Taught

__all__ = ["TeacherCache"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Ask = Callable[[Inputs], Taught]

_ALIKE = 0.02
"""Share of its norm by which an answer may move with the size of the batch: rounding, in half precision too."""


class TeacherCache:
    """Keeps what a teacher said, by a hash of what it was asked.

    For data without random augmentation: an image that is cropped anew each time is a new question each time, and the
    directory only grows. Answers are found again after a restart, and in another run with the same teacher; a teacher
    with other weights, or other recorded modules, has answers of its own.

    Args:
        directory: Where to; several runs may share it.
        max_bytes: The directory never holds more: answers of other teachers go, oldest first, and then nothing more is
            stored.
        per: ``sample`` keeps each row of a batch by itself, so that shuffled data find theirs; needs inputs and answers
            with the samples in dimension 0, which do not depend on one another. That is tried out on the first batch;
            where it is not so, whole batches are kept as with ``batch``.

    Attributes:
        hits: Samples (or batches) that were found.
        misses: Samples (or batches) that the teacher was asked.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int = 10 * 2**30,
        per: Literal["sample", "batch"] = "sample",
    ):
        if per not in ("sample", "batch"):
            raise ConfigError(f"per must be 'sample' or 'batch', got {per!r}")
        self.directory, self.max_bytes, self.per = directory, max_bytes, per
        self.hits = self.misses = 0
        self._store: AnswerStore | None = None
        self._known: Any = None
        self._separable: bool | None = None

    def answer(
        self, teacher: nn.Module, question: str, inputs: Inputs, targets: Sequence[tuple[str, str]], ask: Ask
    ) -> Taught:
        """Return what the teacher says, from the disk where it is there.

        Args:
            teacher: Its weights name the answers.
            question: What else does: the settings that an answer depends on.
            inputs: Positional and keyword inputs.
            targets: What is recorded, in a fixed order.
            ask: Asks the teacher itself.
        """
        store = self._opened(teacher, question)
        tensors = list(tensors_in(inputs))
        device = tensors[0].device if tensors else torch.device("cpu")
        rows = _samples(tensors) if self.per == "sample" and _can_be_cut(inputs) else None
        if rows is not None and self._separable is not False:
            found = self._by_sample(store, content_keys(*inputs, rows), inputs, targets, ask, device)
            if found is not None:
                return found
        return self._by_batch(store, inputs, targets, ask, device)

    def _opened(self, teacher: nn.Module, question: str) -> AnswerStore:
        """The store of these weights; they are hashed anew once they were touched."""
        known = (versions_of(teacher), question)
        if self._store is None or self._known != known:
            name = hashlib.blake2b(f"{model_fingerprint(teacher)}\0{question}".encode(), digest_size=16)
            self._store = AnswerStore(self.directory, name.hexdigest(), self.max_bytes)
            self._known, self._separable = known, None
        return self._store

    def _by_sample(
        self,
        store: AnswerStore,
        keys: list[str],
        inputs: Inputs,
        targets: Sequence[tuple[str, str]],
        ask: Ask,
        device: torch.device,
    ) -> Taught | None:
        """None where an answer is not made of answers to single samples."""
        known = store.read(keys)
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        if missing:
            places = [keys.index(key) for key in missing]
            asked = inputs if len(places) == len(keys) else _cut(inputs, places)
            answer = _flat(ask(asked), targets)
            if self._separable is None:
                self._separable = self._is_separable(answer, len(places), asked, targets, ask)
            if answer is None or not self._separable or not _has_rows(answer, len(places)):
                return None
            answer = {name: own.cpu() for name, own in answer.items()}
            store.write(missing, answer)
            known |= {
                key: {name: own[row] for name, own in answer.items()} for row, key in enumerate(missing)
            }
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        return _taught(stacked([known[key] for key in keys], device), targets)

    def _is_separable(
        self, answer: Row | None, count: int, asked: Inputs, targets: Sequence[tuple[str, str]], ask: Ask
    ) -> bool:
        """Whether the first samples alone get the answer that they get among the others."""
        if answer is None or count < 2 or not _has_rows(answer, count):
            return False
        some = list(range(count // 2))
        alone = _flat(ask(_cut(asked, some)), targets)
        if alone is None or not _has_rows(alone, len(some)):
            return False
        return all(
            float((alone[name] - own[: len(some)]).norm()) <= _ALIKE * float(own.norm())
            for name, own in answer.items()
        )

    def _by_batch(
        self,
        store: AnswerStore,
        inputs: Inputs,
        targets: Sequence[tuple[str, str]],
        ask: Ask,
        device: torch.device,
    ) -> Taught:
        key = content_keys(*inputs, None)[0]
        known = store.read([key])
        if key in known:
            self.hits += 1
            return _taught({name: own.to(device) for name, own in known[key].items()}, targets)
        self.misses += 1
        taught = ask(inputs)
        answer = _flat(taught, targets)
        if answer is not None:
            store.write([key], {name: own[None] for name, own in answer.items()})
        return taught


def _has_rows(answer: Row, count: int) -> bool:
    return all(own.dim() and own.shape[0] == count for own in answer.values())


def _samples(tensors: Sequence[Tensor]) -> int | None:
    """The number of samples, where every tensor has as many in dimension 0."""
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _can_be_cut(inputs: Inputs) -> bool:
    """Whether what is no tensor says nothing about single samples: numbers, texts, nothing."""

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        if type(value) in (list, tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, Tensor | bool | int | float | str)

    return plain(inputs)


def _cut(value: Any, places: list[int]) -> Any:
    """The same structure with some of the samples."""
    if isinstance(value, Tensor):
        return value[torch.tensor(places, device=value.device)]
    if isinstance(value, dict):
        return {key: _cut(entry, places) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_cut(entry, places) for entry in value])
    return value


def _flat(taught: Taught, targets: Sequence[tuple[str, str]]) -> Row | None:
    """All tensors of an answer by a name; None where the logits are no tensor."""
    found: Row = {}
    if taught.logits is not None:
        if not isinstance(taught.logits, Tensor):
            return None
        found["logits"] = taught.logits
    for number, target in enumerate(targets):
        for call, own in enumerate(taught.features.get(target, [])):
            found[f"{number}.{call}"] = own
    return found


def _taught(answer: Row, targets: Sequence[tuple[str, str]]) -> Taught:
    features: dict[tuple[str, str], list[Tensor]] = {}
    for number, target in enumerate(targets):
        calls = 0
        while f"{number}.{calls}" in answer:
            features.setdefault(target, []).append(answer[f"{number}.{calls}"])
            calls += 1
    return Taught(answer.get("logits"), features)
