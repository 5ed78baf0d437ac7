"""Compressors that are made from one another and work in one training: ``Next.from_compressor(previous, ...)``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.compat.nni.evaluator import Evaluator
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.training import Compressor

__all__ = ["Chained", "run_chain", "train_together"]

_FROM_COMPRESSOR = ("self", "model", "config_list", "evaluator", "existed_wrappers")


class Chained:
    """What pruners, quantizers and distillers under NNI's names have in common.

    Attributes:
        bound_model: The model.
        evaluator: Trains; None where none is needed, or where another one of the chain has it.
        fused_compressors: Those that this one was made from, the first one first.
        own_steps: Steps of training that it asks for when nobody says how many.
        own_epochs: Epochs, likewise.
    """

    bound_model: nn.Module
    evaluator: Evaluator | None
    fused_compressors: tuple[Chained, ...] = ()
    own_steps: int | None = None
    own_epochs: int | None = None

    @classmethod
    def from_compressor(
        cls, compressor: Chained, new_config_list: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        """Return a compressor of the same model that works together with ``compressor``, in one training.

        Args:
            compressor: A pruner, quantizer or distiller.
            new_config_list: The new one's own config.
            args: The new one's other arguments in the order of its constructor, and its ``evaluator`` last.
            kwargs: The same by name; without ``evaluator`` that of ``compressor`` is used.

        Raises:
            ConfigError: ``compressor`` is none, or an argument is not known.
        """
        if not isinstance(compressor, Chained):
            raise ConfigError(
                f"from_compressor needs a pruner, quantizer or distiller, got a {type(compressor).__name__}"
            )
        given = cls._bound(args, kwargs)
        given["evaluator"] = given.get("evaluator") or compressor.evaluator
        made = cls(compressor.bound_model, new_config_list, **given)  # type: ignore[call-arg]
        made.fused_compressors = (*compressor.fused_compressors, compressor)
        return made

    @classmethod
    def _bound(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional arguments by their names."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        names = [
            own.name
            for own in parameters
            if own.kind is own.POSITIONAL_OR_KEYWORD and own.name not in _FROM_COMPRESSOR
        ]
        names.append("evaluator")
        if len(args) > len(names):
            raise ConfigError(
                f"{cls.__name__}.from_compressor takes {', '.join(names)}, got {len(args)} values"
            )
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ConfigError(f"{cls.__name__}.from_compressor: {name!r} is given twice")
            if name not in names and not any(own.kind is own.VAR_KEYWORD for own in parameters):
                raise ConfigError(
                    f"{cls.__name__}.from_compressor has no argument {name!r}{did_you_mean(name, names)}"
                )
            given[name] = value
        return given

    # What a subclass says.

    @property
    def trains(self) -> bool:
        """Whether a training is needed."""
        return True

    @property
    def origin_weight(self) -> float:
        """Weight of the task's own loss."""
        return 1.0

    def _before(self, evaluator: Evaluator) -> None:
        """Collect what is needed while nothing is on the model yet."""

    def _start(self, evaluator: Evaluator) -> Compressor | None:
        """Put it on the model; return what takes part in the training."""
        raise NotImplementedError

    def _end(self, steps: int) -> None:
        """The training is over, after so many steps."""

    def _withdraw(self) -> None:
        """Something failed: take it off the model again."""

    def _alone(self) -> None:
        """Do the work without a training."""
        raise NotImplementedError

    def _finished(self) -> None:
        """All of the chain have ended."""


def run_chain(chain: Sequence[Chained], max_steps: int | None, max_epochs: int | None) -> None:
    """Let compressors work on their model: in one training where one of them, or the caller, wants it.

    Args:
        chain: In the order in which they are attached.
        max_steps: Optimizer steps; None is what they ask for.
        max_epochs: Epochs.

    Raises:
        ConfigError: There is no evaluator, or its training ended too early; the model is as before then.
    """
    if max_steps is None and max_epochs is None and not any(own.trains for own in chain):
        for own in chain:
            own._alone()
    else:
        train_together(chain, max_steps, max_epochs)
    for own in chain:
        own._finished()


def train_together(chain: Sequence[Chained], max_steps: int | None, max_epochs: int | None) -> None:
    """Train once, with all compressors of a chain.

    Raises:
        ConfigError: See :func:`run_chain`.
    """
    last = chain[-1]
    evaluator = next((own.evaluator for own in reversed(chain) if own.evaluator is not None), None)
    if evaluator is None:
        raise ConfigError(f"{type(last).__name__} needs an evaluator to train")
    if max_steps is None and max_epochs is None:
        max_steps = max((own.own_steps for own in chain if own.own_steps), default=None)
        max_epochs = max((own.own_epochs for own in chain if own.own_epochs), default=None)
    for own in chain:
        own._before(evaluator)
    started: list[Chained] = []
    try:
        taking_part = []
        for own in chain:
            started.append(own)
            compressor = own._start(evaluator)
            if compressor is not None:
                taking_part.append(compressor)
        weight = math.prod(own.origin_weight for own in chain)
        evaluator.train(last.bound_model, taking_part, max_steps, max_epochs, origin_weight=weight)
        for own in chain:
            own._end(evaluator.steps)
    except BaseException:
        for own in reversed(started):
            own._withdraw()
        raise
