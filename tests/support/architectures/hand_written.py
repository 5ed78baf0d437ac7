"""Small models written by hand to be awkward: ``MODELS`` names them all, by what makes them so."""

from __future__ import annotations

from support.architectures.cases import attention, control, convolution, recurrent, tensors, weights
from support.architectures.example import Builder

MODELS: dict[str, Builder] = {
    **attention.MODELS,
    **convolution.MODELS,
    **recurrent.MODELS,
    **weights.MODELS,
    **control.MODELS,
    **tensors.MODELS,
}
