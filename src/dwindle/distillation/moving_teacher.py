"""A teacher that is the moving average of its student."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.training.schedule import Schedule, value_at

__all__ = ["MovingTeacher", "moving_average"]


def moving_average(average: Tensor, value: Tensor, decay: float, step: int) -> None:
    """Move an average by one step, in place: ``average = d * average + (1 - d) * value``.

    ``d = min(decay, 1 - 1 / step)``: the mean of all values until that is the slower one. Tarvainen and Valpola, "Mean
    teachers are better role models" (https://arxiv.org/abs/1703.01780, section 3).

    Args:
        average: Changed; whole numbers and booleans take the value itself.
        value: Same shape.
        decay: 0 to 1.
        step: Number of the step, from 1 on.
    """
    if not average.is_floating_point():
        average.copy_(value)
        return
    average.lerp_(value.to(average.dtype), 1.0 - min(decay, 1.0 - 1.0 / step))


class MovingTeacher:
    """A copy of a model whose parameters and buffers follow the model's as moving averages.

    The parameters themselves are averaged, not what masks and quantizers make of them: the teacher is the whole model.
    It is made when nothing is attached to the model yet, and follows the parameter objects, whatever is attached later.

    Args:
        model: The student.
        decay: Share of the average that stays at each step, 0 to 1, or a schedule over steps.

    Attributes:
        module: The teacher; its parameters take no gradient.
    """

    def __init__(self, model: nn.Module, decay: float | Schedule):
        if not callable(decay) and not (
            isinstance(decay, int | float) and not isinstance(decay, bool) and 0 <= decay <= 1
        ):
            raise ConfigError(f"ema_decay must be 0 to 1, or a schedule, got {decay!r}")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._parameters = list(zip(self.module.parameters(), model.parameters(), strict=True))
        self._buffers = _buffers(self.module, model)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Averages and what they follow; modules may put a new tensor in a buffer's place."""
        found: list[tuple[Tensor, Tensor]] = list(self._parameters)
        found.extend((average, getattr(owner, name)) for average, owner, name in self._buffers)
        return found

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the student, behind optimizer step number ``step`` (from 1 on).

        Raises:
            ConfigError: The student's shapes changed; a new distiller is needed then.
        """
        decay = value_at(self.decay, step)
        for average, value in self._pairs():
            if average.shape != value.shape:
                raise ConfigError(
                    f"the model was made smaller ({tuple(average.shape)} to {tuple(value.shape)}), so its moving "
                    "average cannot follow; make a new distiller"
                )
            moving_average(average, value.detach().to(average.device), decay, step)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all averages, buffers that a ``state_dict`` leaves out included."""
        return {str(number): average.detach().clone() for number, (average, _) in enumerate(self._pairs())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: It is that of another model.
        """
        shapes = [tuple(average.shape) for average, _ in self._pairs()]
        if [tuple(state[key].shape) for key in sorted(state, key=int)] != shapes:
            raise ConfigError("the saved teacher is the moving average of another model")
        for number, (average, _) in enumerate(self._pairs()):
            average.copy_(state[str(number)])


def _buffers(teacher: nn.Module, model: nn.Module) -> list[tuple[Tensor, nn.Module, str]]:
    """Each buffer of the teacher once, with the student's module and name that it follows."""
    seen: set[int] = set()
    found = []
    for own, other in zip(teacher.modules(), model.modules(), strict=True):
        for name, buffer in own._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                found.append((buffer, other, name))
    return found
