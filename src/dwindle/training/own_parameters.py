"""Compressors' own parameters in the user's optimizer, and in one of their own where its steps are too small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.training.compressor import Compressor
from dwindle.training.parameter_groups import base_rate, follow_new_groups

__all__ = ["OwnParameters"]

_ADAM_RATE = 1e-3
"""Adam's learning rate for parameters that name none."""


class OwnParameters:
    """Who trains the scores, gates, scales and projections of a run's compressors.

    Args:
        compressors: Of the run.

    Attributes:
        order: Positions of compressors, in the order in which their parameters came to the optimizers.
    """

    def __init__(self, compressors: Sequence[Compressor]) -> None:
        self.compressors = tuple(compressors)
        self.order: list[int] = []
        self._followed: list[_Followed] = []
        self._apart: torch.optim.Adam | None = None
        self._apart_multiplier = 1.0

    def add_to(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Any | None,
        multiplier: float,
        options: dict[str, Any],
    ) -> int:
        """Add what nobody trains yet, now and whenever :meth:`follow_up` is called; return how many were added."""
        followed = _Followed(optimizer, schedule, options, _checked(multiplier))
        self._followed = [own for own in self._followed if own.optimizer is not optimizer] + [followed]
        return self._add(followed)

    def follow_up(self) -> None:
        """Let the optimizers train what compressors that have just begun brought with them."""
        for followed in self._followed:
            self._add(followed)

    def continue_order(self, saved: Sequence[int]) -> None:
        """Add what comes next in the order that a saved run had."""
        self.order += [own for own in saved if own not in self.order]

    def _add(self, followed: _Followed) -> int:
        """Add what an optimizer does not have yet."""
        optimizer, apart = followed.optimizer, self._apart
        known = _held(optimizer) | (set() if apart is None else _held(apart))
        added, first = 0, len(optimizer.param_groups)
        for position in self.order + [own for own in range(len(self.compressors)) if own not in self.order]:
            compressor = self.compressors[position]
            wanted = _options_of(compressor)
            missing = _missing(compressor, known)
            if missing and position not in self.order:
                self.order.append(position)
            if missing and apart is not None and wanted.get("adaptive"):
                apart.add_param_group(_adaptive_group(missing, wanted, self._apart_multiplier))
            elif missing:
                own = {"lr": base_rate(optimizer.param_groups[0]), **wanted}
                own = {key: value for key, value in own.items() if key in optimizer.defaults}
                own |= followed.options
                if "lr" in own:
                    own["lr"] *= followed.multiplier
                optimizer.add_param_group({"params": missing, **own})
                added += len(missing)
        if followed.schedule is not None:
            follow_new_groups(followed.schedule, optimizer, first)
        return added

    def adaptive_optimizer(
        self, optimizer: torch.optim.Optimizer, multiplier: float
    ) -> torch.optim.Adam | None:
        """Return Adam for parameters that plain gradient steps hardly move, or None where there are none."""
        self._apart_multiplier = _checked(multiplier)
        if not isinstance(optimizer, torch.optim.SGD) or self._apart is not None:
            return None
        known = _held(optimizer)
        groups, wanted_later = [], False
        for compressor in self.compressors:
            wanted = _options_of(compressor)
            if wanted.get("adaptive"):
                wanted_later |= next(iter(compressor.parameters()), None) is None  # it has not begun
                missing = _missing(compressor, known)
                groups += [_adaptive_group(missing, wanted, multiplier)] if missing else []
        if groups or wanted_later:
            # Adam wants a parameter to begin with; those of a compressor that begins later are not there yet.
            self._apart = torch.optim.Adam(groups or [{"params": [nn.Parameter(torch.zeros(0))]}])
        return self._apart


@dataclass(frozen=True)
class _Followed:
    """An optimizer that trains the compressors' parameters, and how they are to be added."""

    optimizer: torch.optim.Optimizer
    schedule: Any | None
    options: dict[str, Any]
    multiplier: float


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _missing(compressor: Compressor, known: set[int]) -> list[nn.Parameter]:
    """Return the compressor's parameters that nobody trains yet, and count them as known."""
    found = []
    for parameter in compressor.parameters():
        if id(parameter) not in known:
            known.add(id(parameter))
            found.append(parameter)
    return found


def _options_of(compressor: Compressor) -> dict[str, Any]:
    wanted: dict[str, Any] = getattr(compressor, "parameter_options", dict)()
    return wanted


def _adaptive_group(
    parameters: list[nn.Parameter], wanted: dict[str, Any], multiplier: float
) -> dict[str, Any]:
    return {"params": parameters, "lr": wanted.get("lr", _ADAM_RATE) * multiplier}


def _checked(multiplier: float) -> float:
    if not multiplier > 0:
        raise ConfigError(f"multiplier must be above 0, got {multiplier!r}")
    return multiplier
