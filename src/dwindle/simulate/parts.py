"""Whole parts of a method that stand in the root of a model, beside the simulators of single targets.

They have the reserved name too: what they hold moves with the model, is saved and loaded with it, and its
containers do not see it.
"""

from __future__ import annotations

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.simulate.host import refresh, table_of
from dwindle.simulate.simulators import RESERVED, SimulatorStack, SimulatorTable


def add_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part in the root of a model.

    Args:
        model: Changed in place.
        name: What it is called; its state stands under ``_dwindle.<name>``.
        part: Any module that is no simulator of a target.

    Raises:
        ConfigError: There is one of this name.
    """
    table = table_of(model)
    if table is not None and name in table._modules:
        raise ConfigError(f"the model has a {name!r} of dwindle already; take that off first")
    table = SimulatorTable() if table is None else table
    table._modules[name] = part
    model._modules[RESERVED] = table
    table.train(model.training)
    refresh(model)


def part_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return a part of the root; None when there is none of this name."""
    table = table_of(model)
    found = None if table is None else table._modules.get(name)
    return None if isinstance(found, SimulatorStack) else found


def remove_part(model: nn.Module, name: str) -> None:
    """Take a part out of the root again; nothing happens when it is not there."""
    table = table_of(model)
    if table is None or part_of(model, name) is None:
        return
    del table._modules[name]
    if not table._modules:
        del model._modules[RESERVED]
    refresh(model)
