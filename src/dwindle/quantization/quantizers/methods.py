"""The quantizers of training by the name of their method: one kind for weights, one for activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dwindle.config.errors import ConfigError
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.base import Quantizer
from dwindle.quantization.quantizers.dorefa import DorefaActivationQuantizer, DorefaWeightQuantizer
from dwindle.quantization.quantizers.learned_range import AsymmetricRangeQuantizer, SymmetricRangeQuantizer
from dwindle.quantization.quantizers.lsq import LsqPlusQuantizer, LsqQuantizer
from dwindle.quantization.quantizers.moving_average import MovingAverageQuantizer
from dwindle.quantization.quantizers.pact import PactQuantizer
from dwindle.quantization.quantizers.tqt import TqtQuantizer


@dataclass(frozen=True)
class Method:
    """What a published method puts on weights and on activations."""

    weights: Callable[..., Quantizer]
    activations: Callable[..., Quantizer]


_AS_THEY_ARE = partial(MovingAverageQuantizer, momentum=1.0)
"""Weights are covered as they are at each step."""

METHODS: dict[str, Method] = {
    "qat": Method(_AS_THEY_ARE, MovingAverageQuantizer),
    "lsq": Method(LsqQuantizer, LsqQuantizer),
    "lsq_plus": Method(LsqPlusQuantizer, LsqPlusQuantizer),
    "pact": Method(_AS_THEY_ARE, PactQuantizer),
    "tqt": Method(TqtQuantizer, TqtQuantizer),
    "symmetric_range": Method(SymmetricRangeQuantizer, SymmetricRangeQuantizer),
    "asymmetric_range": Method(SymmetricRangeQuantizer, AsymmetricRangeQuantizer),
    "dorefa": Method(DorefaWeightQuantizer, DorefaActivationQuantizer),
}
"""Methods by name. PACT is about activations only; NNCF's asymmetric mode is commonly used with symmetric weights."""


def make_quantizer(
    method: str, form: NumberFormat, axis: int | None = None, *, activation: bool, **options: Any
) -> Quantizer:
    """Return a new quantizer of a method, still without a range.

    Args:
        method: One of :data:`METHODS`.
        form: The levels.
        axis: The dimension with one scale for each index, or None for one scale.
        activation: True for an activation, False for a weight.
        options: More arguments of that quantizer.

    Raises:
        ConfigError: The method is not known, or cannot do these levels.
    """
    if method not in METHODS:
        raise ConfigError(f"quantization method {method!r} is not known; there are {', '.join(METHODS)}")
    found = METHODS[method]
    return (found.activations if activation else found.weights)(form, axis, activation=activation, **options)
