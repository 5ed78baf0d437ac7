"""What an accuracy-aware training compresses: one model in place, or a new one for each rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.training.checkpoint import (
    copy_of_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)
from dwindle.training.loader_state import loader_state, restore_loader
from dwindle.training.processes import rank

__all__ = ["BestState", "InPlace", "MadeAnew", "Subject"]


class Subject(Protocol):
    """What is compressed.

    Attributes:
        model: The model now.
        within_trials: Whether a state can be taken while a trial goes on, and not only between two.
    """

    model: nn.Module | None
    within_trials: bool

    def uncompressed(self) -> nn.Module:
        """Return the model at rate 0, to be evaluated before anything else."""

    def abandon(self) -> None:
        """Take back what :meth:`uncompressed` did, when nothing comes of it."""

    def set(self, rate: float) -> None:
        """Compress by a rate; training goes on from where it is."""

    def state(self) -> dict[str, Any]:
        """Return everything that :meth:`load` needs, in copies."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""


class InPlace:
    """A model whose compressor renews its masks (or the like) at every rate.

    Args:
        compressor: Has ``model``, ``update(rate)``, ``state_dict()`` and ``load_state_dict()``. A pruner that was not
            asked for masks yet begins with those of rate 0.
        keep: What is put back with the model: optimizers, schedules, loaders.
    """

    within_trials = True

    def __init__(self, compressor: Any, keep: Sequence[Any]) -> None:
        for name in ("update", "state_dict", "load_state_dict"):
            if not callable(getattr(compressor, name, None)):
                raise ConfigError(
                    f"compressor is a {type(compressor).__name__}, which has no {name}(): give a pruner without "
                    "schedule, or a function that returns a compressed model for a rate"
                )
        self.compressor, self.keep = compressor, tuple(keep)
        self.model: nn.Module | None = compressor.model
        self._begun_here = False

    def uncompressed(self) -> nn.Module:
        """Return the model, with whatever the compressor puts on it at rate 0."""
        if self.compressor.state_dict().get("compressed") is False:
            self.compressor.compress(0.0)
            self._begun_here = True
        else:
            self.compressor.update(0.0)
        assert self.model is not None
        return self.model

    def abandon(self) -> None:
        """Take the masks off again, if they were put on here."""
        if self._begun_here:
            self.compressor.detach(keep_values=False)

    def set(self, rate: float) -> None:
        """Renew the masks."""
        self.compressor.update(rate)

    def state(self) -> dict[str, Any]:
        """Return model, compressor and what is kept."""
        assert self.model is not None
        kept = [loader_state(own) for own in self.keep]
        return copy_of_state(
            {"model": dict(self.model.state_dict()), "compressor": self.compressor.state_dict(), "keep": kept}
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Put everything back in place."""
        assert self.model is not None
        self.compressor.load_state_dict(copy_of_state(state["compressor"]))
        self.model.load_state_dict(state["model"])
        for own, saved in zip(self.keep, state["keep"], strict=True):
            restore_loader(own, copy_of_state(saved))


class MadeAnew:
    """A function that makes a compressed model of its own for each rate.

    Args:
        make: ``make(rate)`` returns a model; two calls with one rate give models of the same structure.
    """

    within_trials = False

    def __init__(self, make: Callable[[float], nn.Module]) -> None:
        self.make = make
        self.model: nn.Module | None = None
        self.rate: float | None = None

    def uncompressed(self) -> nn.Module:
        """Return the model at rate 0."""
        return self.make(0.0)

    def abandon(self) -> None:
        """Nothing is left behind."""

    def set(self, rate: float) -> None:
        """Make another model."""
        self.model, self.rate = self.make(rate), rate

    def state(self) -> dict[str, Any]:
        """Return rate and values; the rate is None before the first model."""
        model = {} if self.model is None else dict(self.model.state_dict())
        return copy_of_state({"rate": self.rate, "model": model})

    def load(self, state: Mapping[str, Any]) -> None:
        """Make the model again, and give it its values."""
        if state["rate"] is None:
            self.model = self.rate = None
            return
        if self.rate != state["rate"]:
            drawn = random_state()
            self.set(float(state["rate"]))
            restore_random_state(drawn)
        assert self.model is not None
        self.model.load_state_dict(state["model"])


class BestState:
    """The best state so far: in memory, or in a file of its own beside the search's.

    Args:
        path: The search's file; None holds the state in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.number = path, 0
        self._held: dict[str, Any] | None = None

    def keep(self, state: dict[str, Any], number: int) -> None:
        """Hold a state under the number of its trial."""
        self.number = number
        if self.path is None:
            self._held = state
        elif rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_state(state, self._file(number))

    def get(self) -> dict[str, Any]:
        """Return the state."""
        if self.path is not None:
            return load_state(self._file(self.number))
        assert self._held is not None
        return self._held

    def drop_others(self) -> None:
        """Remove the files of earlier best states, once nothing refers to them."""
        if self.path is None or rank() != 0:
            return
        for other in self.path.parent.glob(f"{self.path.name}.best-*"):
            if other != self._file(self.number) and other.suffix != ".part":
                other.unlink()

    def _file(self, number: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.best-{number}")
