"""Quantizers of a model that is trained with them, carried over a cut: off before, shorter and on again after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.config.errors import RealizeError
from dwindle.quantization.aware_training import TrainedQuantizers, bank_of
from dwindle.quantization.aware_training.bank import attach_bank, detach_bank
from dwindle.quantization.quantizers import Quantizer
from dwindle.realize.shrink import ShrinkResult


@dataclass
class Carried:
    """What a cut gave.

    Attributes:
        result: Set by whoever cuts; None leaves the model as it was.
    """

    result: ShrinkResult | None = None


@contextlib.contextmanager
def carried_quantizers(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Carried]:
    """Take a model's quantizers off for the time of a cut, and put them on the small model.

    Scales of channels that went go too, with what a live optimizer holds for them. A model without quantizers is left
    alone.

    Args:
        model: The model.
        optimizer: A live optimizer that trains the scales.

    Raises:
        RealizeError: The cut gave a rewritten graph, where the places of quantizers are unknown.
    """
    carried = Carried()
    bank = detach_bank(model)
    try:
        yield carried
        if bank is not None and carried.result is not None:
            if carried.result.plan.rewritten:
                raise RealizeError(
                    "this cut rewrites the graph, where quantizers of training have no place; "
                    "finish the quantization first (quantizer.finish()), or withdraw it"
                )
            shorten(bank, carried.result, optimizer)
    finally:
        if bank is not None and bank_of(model) is None:
            attach_bank(model, bank)


def shorten(bank: TrainedQuantizers, result: ShrinkResult, optimizer: torch.optim.Optimizer | None) -> None:
    """Cut the scales of channels that went, in place.

    Args:
        bank: The quantizers.
        result: What was cut; its model is the one that was cut in place.
        optimizer: Its state of the scales is cut too.
    """
    done: set[int] = set()
    for key, number in bank.weight_of.items():
        place, quantizer = bank.places.final.weights[key], bank.weights[number]
        assert isinstance(quantizer, Quantizer)
        layer = result.model.get_submodule(key.module)
        if place.bias is None and layer._parameters.get("bias") is not None:
            place.bias, place.bias_name = (
                (2,),
                f"{key.module}.bias",
            )  # folding of constants gave the layer one
        axis = quantizer.axis
        stay = result.plan.keep.get(place.name, {})
        if axis is None or number in done:
            continue
        rank = result.model.get_parameter(place.name).dim()
        index = stay.get(axis % rank)
        if index is None:
            continue
        done.add(number)
        for held in (*quantizer.parameters(recurse=False), *quantizer.buffers(recurse=False)):
            _cut(held, index, optimizer)


def _cut(held: Tensor, index: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    old = held.shape
    if len(old) != 1 or old[0] <= int(index.max()):
        return
    held.data = held.data[index.to(held.device)]
    held.grad = None
    for name, value in (optimizer.state.get(held, {}) if optimizer is not None else {}).items():
        if isinstance(value, Tensor) and value.shape == old:
            optimizer.state[held][name] = value[index.to(value.device)]  # type: ignore[union-attr]
