"""What a training loop and a compressor owe each other: three things, and nothing more.

A compressor is told when a step ended (:meth:`Compressor.step`), its loss is added
(:meth:`Compressor.loss`) and its parameters are optimized (:meth:`Compressor.parameters`). Pruners,
quantizers and distillers all look like this, so they work together in anyone's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dwindle.config.errors import ConfigError

__all__ = ["Compressor", "attach_compressor", "can_detach", "check_compressor", "detach_compressor"]


@runtime_checkable
class Compressor(Protocol):
    """A method of compression that takes part in training.

    More methods are used where they exist: ``attach()`` puts hooks and simulators on the model (called when the
    ``with`` block of :func:`dwindle.training.compress` is entered; ``compress()`` serves in its place), ``detach()``
    takes them off, ``parameter_options()`` gives the options that its parameters want in an optimizer
    (``{"weight_decay": 0.0}``; ``{"adaptive": True}`` where plain gradient steps are too small for them), ``claims()``
    says which targets it will act on (:class:`dwindle.training.Claim`), ``rest()`` lets what it has made stand and ends
    the rest (:class:`dwindle.training.Staged`), ``status()`` gives numbers to be watched,
    and ``realize_options()`` lists of what ``run.realize()`` is to do beyond masks.
    """

    def step(self) -> None:
        """The optimizer has made one step."""

    def loss(self) -> Tensor | float:
        """What to add to the loss of this batch: a 0-d tensor that can be differentiated, or 0.0."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compressor's own trainable parameters (scores, learned scales, ...), often none."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on later: tensors, numbers, strings, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""


_REQUIRED = ("step", "loss", "parameters", "state_dict", "load_state_dict")


def check_compressor(candidate: object, position: int) -> None:
    """Raise when ``candidate`` does not do what a compressor must.

    Raises:
        ConfigError: A method is missing; the message names it.
    """
    missing = [name for name in _REQUIRED if not callable(getattr(candidate, name, None))]
    if missing:
        raise ConfigError(
            f"compressors[{position}] is a {type(candidate).__name__}, which is no compressor: it has no "
            f"{', '.join(name + '()' for name in missing)}"
        )


def attach_compressor(compressor: Compressor) -> None:
    """Put the compressor's hooks on its model: ``attach()``, or ``compress()``, or nothing to do."""
    start: Callable[[], object] | None = getattr(compressor, "attach", None) or getattr(
        compressor, "compress", None
    )
    if start is not None:
        start()


def can_detach(compressor: Compressor) -> bool:
    """Whether the compressor takes its own hooks and simulators off."""
    return callable(getattr(compressor, "detach", None))


def detach_compressor(compressor: Compressor) -> None:
    """Take the compressor's hooks off its model, where it has a ``detach()``."""
    stop: Callable[[], object] | None = getattr(compressor, "detach", None)
    if stop is not None:
        stop()
