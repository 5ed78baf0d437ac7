"""Which tokens are real: padding has values too, but nobody reads them, so they must not count in ranges and means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PADDING_MASK = "attention_mask"
"""The argument by which text models are told: ``[batch, tokens]``, zero where a token is padding."""


def padding_mask(kwargs: Mapping[str, Any], name: str | None = PADDING_MASK) -> Tensor | None:
    """Return which tokens of a batch are real.

    Args:
        kwargs: The keyword arguments of a forward.
        name: The argument that says it; None counts every token.

    Returns:
        Booleans ``[batch, tokens]``; None where there is no such argument, none of its tokens is padding, or a whole
        sample is (so that the mask must mean something else).
    """
    given = kwargs.get(name) if name is not None else None
    if not isinstance(given, Tensor) or given.dim() != 2:
        return None
    real = given != 0
    if bool(real.all()) or not bool(real.any(1).all()):
        return None
    return real


def real_tokens(value: Tensor, real: Tensor | None) -> Tensor:
    """Return the values of real tokens alone.

    Args:
        value: An activation. ``[batch, tokens, ...]`` loses its padding; anything else is returned as it is, also
            where it cannot be told which dimension is that of the tokens.
        real: What :func:`padding_mask` returned.

    Returns:
        ``[real tokens, ...]``, or the value.
    """
    if real is None or value.dim() < 3 or value.shape[:2] != real.shape:
        return value
    if real.shape[1] in value.shape[2:-1]:
        return value  # the dimension behind could as well be that of the tokens
    return value[real]


__all__ = ["PADDING_MASK", "padding_mask", "real_tokens"]
