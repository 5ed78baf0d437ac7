"""A compressor that takes part in a run from one step to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from dwindle import simulate
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.training.claims import Claim, claims_of
from dwindle.training.compressor import (
    Compressor,
    attach_compressor,
    can_detach,
    check_compressor,
    detach_compressor,
)
from dwindle.training.many_processes import sharding_problem

__all__ = ["Staged", "count_epochs"]

_UNITS = ("step", "epoch")


class Staged:
    """Lets a compressor act from one step (or epoch) of a run to another.

    Until ``start`` nothing of it is on the model. From then on it is attached, its loss is added and it is told of
    steps, which it counts from its own beginning. At ``stop`` what it has made stands: its masks and quantizers stay
    and move no more, its parameters are not trained any longer, its loss is not added.

        with dw.compress(model, [pruner, Staged(quantizer, start=500), Staged(distiller, stop=800)]) as run: ...

    Args:
        compressor: A pruner, quantizer, distiller, ...
        start: The step at which it begins; 0 is before the first one.
        stop: The step after which it rests; None is never.
        unit: What ``start`` and ``stop`` count: ``"step"``, or ``"epoch"`` (``dw.compress`` is then told
            ``steps_per_epoch``; :func:`dwindle.training.fit` knows it).

    Raises:
        ConfigError: It is no compressor, or the numbers do not fit.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        start: int = 0,
        stop: int | None = None,
        unit: Literal["step", "epoch"] = "step",
    ) -> None:
        check_compressor(compressor, 0)
        if unit not in _UNITS:
            raise ConfigError(f"unit: {unit!r} is not one of {', '.join(_UNITS)}{did_you_mean(unit, _UNITS)}")
        for name, value in {"start": start, "stop": stop}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name}: {value!r} is not a number of {unit}s from 0 on")
        if stop is not None and stop <= start:
            raise ConfigError(f"stop: {stop} is not behind start: {start}")
        self.compressor, self.unit = compressor, unit
        self._start, self._stop = start, stop
        self._factor: int | None = 1 if unit == "step" else None
        self.steps = 0
        self.started = False
        self.stopped = False
        self._on_model = False

    @property
    def model(self) -> nn.Module | None:
        """The compressor's model; None where it does not say."""
        return getattr(self.compressor, "model", None)

    @property
    def name(self) -> str:
        """The compressor's own name."""
        return str(getattr(self.compressor, "name", None) or type(self.compressor).__name__)

    @property
    def window(self) -> tuple[int, int | None]:
        """The step at which it begins, and the one after which it rests."""
        if self._factor is None:
            raise ConfigError(
                f"{self.name} starts and stops by epochs: say how many steps an epoch has, "
                "dw.compress(model, [...], steps_per_epoch=len(loader))"
            )
        return self._start * self._factor, None if self._stop is None else self._stop * self._factor

    def count_epochs(self, steps_per_epoch: int) -> None:
        """Learn how many optimizer steps an epoch has."""
        if self.unit == "epoch":
            self._factor = steps_per_epoch

    def sharding_problem(self) -> str | None:
        """Return why the compressor cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        return sharding_problem(self.compressor)

    def claims(self) -> Iterator[Claim]:
        """Yield what the compressor will act on."""
        yield from claims_of(self.compressor)

    # The contract of a compressor.

    def attach(self) -> None:
        """Attach the compressor if its time has come."""
        if self.started or self.steps >= self.window[0]:
            self._begin()

    def detach(self) -> None:
        """Take the compressor off, if it is on."""
        if not self._on_model:
            return
        self._on_model = False
        detach_compressor(self.compressor)
        if self.model is not None and not can_detach(self.compressor):
            simulate.detach(self.model)

    def step(self) -> None:
        """The optimizer has made one step."""
        start, stop = self.window
        self.steps += 1
        if self.started and not self.stopped:
            self.compressor.step()
        elif not self.started and self.steps >= start:
            self._begin()
        if stop is not None and self.steps >= stop and not self.stopped:
            self._rest()

    def loss(self) -> Tensor | float:
        """The compressor's loss while it acts, else 0.0."""
        return self.compressor.loss() if self._acts else 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compressor's own parameters, once it has begun."""
        if self.started:
            yield from self.compressor.parameters()

    def parameter_options(self) -> dict[str, Any]:
        """Options of its parameters in an optimizer."""
        wanted: dict[str, Any] = getattr(self.compressor, "parameter_options", dict)()
        return wanted

    def realize_options(self) -> dict[str, list[Any]]:
        """What the compressor wants of ``run.realize()``."""
        own: dict[str, list[Any]] = (
            getattr(self.compressor, "realize_options", dict)() if self.started else {}
        )
        return own

    def status(self) -> dict[str, float]:
        """What the compressor says of itself, and whether it acts."""
        own: dict[str, float] = getattr(self.compressor, "status", dict)() if self.started else {}
        return {"acts": float(self._acts), **own}

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands, and the compressor's state once that has begun."""
        return {
            "steps": self.steps,
            "started": self.started,
            "stopped": self.stopped,
            "compressor": self.compressor.state_dict() if self.started else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; a compressor that had begun is attached.

        Raises:
            ConfigError: A key is missing, or it has begun here and had not there.
        """
        missing = {"steps", "started", "stopped", "compressor"} - set(state)
        if missing:
            raise ConfigError(f"the state of a Staged {self.name} needs {', '.join(sorted(missing))}")
        if self.started and not state["started"]:
            raise ConfigError(
                f"{self.name} is on the model already, and was not when the state was saved; enter a new run"
            )
        self.steps = int(state["steps"])
        if state["started"]:
            if not self.started:
                self._begin()
            self.compressor.load_state_dict(state["compressor"])
            if state["stopped"] and not self.stopped:
                self._rest()

    # Inside.

    @property
    def _acts(self) -> bool:
        return self.started and not self.stopped

    def _begin(self) -> None:
        attach_compressor(self.compressor)
        self.started = self._on_model = True

    def _rest(self) -> None:
        """Let what stands be: masks become final, hooks that only serve a loss go, nothing is trained any more."""
        finish = getattr(self.compressor, "rest", None)
        if callable(finish):
            finish()
        self.stopped = True
        for parameter in self.compressor.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def count_epochs(compressors: Sequence[Any], steps_per_epoch: int) -> None:
    """Tell those that are staged by epochs how many optimizer steps an epoch has.

    Raises:
        ConfigError: It is no number of steps.
    """
    if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
        raise ConfigError(f"steps_per_epoch: {steps_per_epoch!r} is not a number of steps from 1 on")
    for compressor in compressors:
        if isinstance(compressor, Staged):
            compressor.count_epochs(steps_per_epoch)
