"""What was done to a model, as an ordered list of JSON-ready entries that travels with it.

The list stands in the module's ``__dict__``: it survives ``deepcopy``, never shows up in a ``state_dict``, and is
what :func:`dwindle.save` writes to the manifest and :func:`dwindle.load` replays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_KEY = "_dwindle_history"


def record(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Append one step to the history of ``model``.

    Args:
        model: The root module.
        entry: JSON-ready data with a ``"kind"``, such as ``{"kind": "shrink", "plan": {...}}``.
    """
    # a new list, so that a copy of the model never shares its history with the original
    vars(model)[_KEY] = [*history(model), dict(entry)]


def history(model: nn.Module) -> list[dict[str, Any]]:
    """Return the steps that were recorded on ``model``, oldest first."""
    return list(vars(model).get(_KEY, []))
