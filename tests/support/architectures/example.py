"""One model of the catalogue with the inputs it is run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(slots=True)
class Example:
    """A model and what to call it with.

    Attributes:
        model: Freshly built, with random weights.
        args: Positional inputs (a batch of two where the model has a batch).
        kwargs: Keyword inputs.
        note: What a reader of the sweep's table should know about this entry.
        training: Positional and keyword inputs in training mode, where they differ (targets of a detector).
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    training: tuple[tuple[Any, ...], dict[str, Any]] | None = None


#: Builds an example when it is called.
Builder = Callable[[], Example]
