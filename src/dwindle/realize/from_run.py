"""What ``run.realize()`` does: masks are cut out, then layers whose ranks were learned become chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.config import FactorizationSetting
from dwindle.factorization.planning import selected_settings
from dwindle.realize.factorize import factorize as make_chains
from dwindle.realize.from_masks import realize
from dwindle.realize.shrink import ShrinkResult, count_parameters

__all__ = ["realize_run"]


def realize_run(
    model: nn.Module,
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    factorize: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> ShrinkResult:
    """Make the small model of a training run.

    Args:
        model: The model.
        example_inputs: A tensor, or a tuple of positional inputs.
        example_kwargs: Keyword inputs.
        optimizer: A live optimizer, which goes on with what is left.
        factorize: Learned ranks, as entries of :func:`dwindle.factorize`.
        options: More arguments of :func:`dwindle.realize`.

    Raises:
        RealizeError: The small model, or a chain, was not proven equal. Where only a chain was not, the model is
            small and whole.
    """
    selected_settings(
        model, factorize or None, FactorizationSetting()
    )  # names that do not fit show before the cut
    result = realize(model, example_inputs, example_kwargs=example_kwargs, optimizer=optimizer, **options)
    if factorize:
        result.factorization = make_chains(
            result.model,
            factorize,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            optimizer=optimizer,
        )
        result.model = result.factorization.model
        result.parameters_after = count_parameters(result.model)
    return result
