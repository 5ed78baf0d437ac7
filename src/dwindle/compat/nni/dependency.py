"""Channels that belong together: NNI's helper that writes group ids into a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config import resolve


class CoupledConfig(list[dict[str, Any]]):
    """A config_list with the example inputs from which the pruner finds what belongs together.

    Attributes:
        example_inputs: Positional inputs of the model.
    """

    example_inputs: Any = None


def auto_set_dependency_group_ids(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Any
) -> CoupledConfig:
    """Let the pruner that gets this list couple what belongs together in the model.

    NNI writes ``dependency_group_id`` and ``internal_metric_block`` into the entries. Here the list is as it was, and
    remembers the inputs: the pruner analyses the model itself and couples residual branches, grouped and depthwise
    convolutions, norms, heads.

    Args:
        model: The model, only read.
        config_list: Checked against it.
        dummy_input: A tensor or a tuple of inputs.

    Raises:
        ConfigError: The list does not fit the model.
    """
    resolve(model, config_list, "pruning")
    coupled = CoupledConfig(dict(entry) for entry in config_list)
    coupled.example_inputs = tuple(dummy_input) if isinstance(dummy_input, tuple | list) else (dummy_input,)
    return coupled


def example_inputs_of(config_list: object) -> Any:
    """Return the inputs that a list remembers, or None."""
    return getattr(config_list, "example_inputs", None)


#: As NNI spells it.
auto_set_denpendency_group_ids = auto_set_dependency_group_ids
