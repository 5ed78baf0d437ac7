"""What was done to a model, kept with it: a list of JSON entries that survives ``copy.deepcopy``.

The list stands in the module's ``__dict__``, so it adds nothing to the ``state_dict``. Saving writes it to
the manifest, loading repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError

_ATTRIBUTE = "_dwindle_history"


def record(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Add one step to a model's history.

    Args:
        model: The model the step was done to.
        entry: What was done: a ``"kind"`` (``"shrink"``, ``"quantize"``, ...) and JSON-ready facts; copied.

    Raises:
        ConfigError: The entry has no ``"kind"``, or holds something that JSON cannot.
    """
    if not isinstance(entry.get("kind"), str):
        raise ConfigError(
            f"a history entry needs a 'kind' that is a text; got the keys {sorted(map(str, entry))}"
        )
    try:
        copied = json.loads(json.dumps(dict(entry)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the history entry {entry['kind']!r} is not JSON: {error}") from error
    model.__dict__.setdefault(_ATTRIBUTE, []).append(copied)


def history(model: nn.Module) -> list[dict[str, Any]]:
    """Return a copy of what was done to a model, oldest first; empty for an untouched model."""
    entries: list[dict[str, Any]] = json.loads(json.dumps(model.__dict__.get(_ATTRIBUTE, [])))
    return entries
