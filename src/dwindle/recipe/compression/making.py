"""From what a recipe says of an algorithm to the compressor that does it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller
from dwindle.factorization import LowRankTraining
from dwindle.quantization import BinaryQuantizer, BinaryStages, Bits, QuantizationStages, TrainingQuantizer
from dwindle.recipe.compression.making_pruners import make_pruning
from dwindle.recipe.compression.materials import Materials, Place
from dwindle.recipe.compression.window import Made, Window
from dwindle.recipe.reader import Location, Reader
from dwindle.recipe.schema.compression import (
    Algorithm,
    Binarization,
    DistillationAlgorithm,
    Factorization,
    FreezingAlgorithm,
    Pruning,
    Quantization,
)
from dwindle.training import Compressor, Freezing, Staged

__all__ = ["make_compressors"]


def make_compressors(
    algorithms: Sequence[Algorithm],
    model: nn.Module,
    materials: Materials,
    reader: Reader,
    location: Location = ("compression",),
) -> list[Compressor]:
    """Make the compressor of every algorithm; the model is only read.

    Args:
        algorithms: In their order.
        model: The model.
        materials: What they are made with.
        reader: Of the recipe, for messages.
        location: Where the list stands in it.

    Raises:
        ConfigError: An algorithm does not fit the model, or something that it needs is missing; the message names the
            file, the entry and the key.
    """
    found = []
    for position, algorithm in enumerate(algorithms):
        place = Place(reader, (*location, position, algorithm.kind))
        try:
            found.append(_make(algorithm, model, materials, place))
        except ConfigError as error:
            if str(error).startswith(reader.source):
                raise
            raise ConfigError(reader.text(place.location, str(error))) from error
    return found


def _make(algorithm: Algorithm, model: nn.Module, materials: Materials, place: Place) -> Compressor:
    start = materials.step_of(algorithm.start, place, "start")
    stop = None if algorithm.stop is None else materials.step_of(algorithm.stop, place, "stop")
    if stop is not None and stop <= start:
        place.fail("stop", f"step {stop} is not behind the start, step {start}")
    window = Window(materials, place, start, stop)
    for kind, maker in _MAKERS.items():
        if isinstance(algorithm, kind):
            compressor, left_to_staged = maker(algorithm, model, window)
            break
    else:
        raise TypeError(f"no maker for {type(algorithm).__name__}")
    begin = start if left_to_staged != "nothing" else 0
    end = stop if left_to_staged == "both" else None
    return compressor if begin == 0 and end is None else Staged(compressor, start=begin, stop=end)


def _quantization(said: Quantization, model: nn.Module, window: Window) -> Made:
    materials = window.materials
    materials.need_calibration_data(window.place, "quantization")

    def later(key: str) -> int | None:
        return window.after_start(getattr(said, key), key)

    stages = QuantizationStages(
        activations=later("start_activations") or 0,
        freeze_ranges=later("freeze_ranges"),
        freeze_normalization=later("freeze_normalization"),
    )
    quantizer = TrainingQuantizer(
        model,
        said.config_list,
        calibration_data=materials.calibration_data,
        method=said.method,
        bits=Bits(said.weight_bits, said.activation_bits, said.end_bits),
        stages=stages,
        backend=said.backend,
        example_inputs=materials.inputs,
        observer=said.observer,
        max_batches=said.calibration_batches,
        avoid_saturation=said.avoid_saturation,
        gradient_bits=said.gradient_bits,
        penalty=said.penalty,
        options=said.options,
    )
    return quantizer, "both"


def _binarization(said: Binarization, model: nn.Module, window: Window) -> Made:
    """Its own stages count from the run's beginning, as learned steps start from what layers see before their stage."""
    start = window.start

    def later(key: str) -> int | None:
        found = window.after_start(getattr(said, key), key)
        return None if found is None else found + start

    weights = later("start_weights")
    stages = BinaryStages(
        activations=start,
        weights=start if weights is None else weights,
        decay=later("decay"),
        end=later("end"),
        power=said.power,
    )
    if start == 0 and said.activations == "scale_threshold":
        window.materials.need_inputs(window.place, "a scale that is learned from the first step on")
    quantizer = BinaryQuantizer(
        model,
        said.config_list,
        weights=said.weights,
        activations=said.activations,
        stages=stages,
        example_inputs=window.materials.args or None,
    )
    return quantizer, "nothing"


def _distillation(said: DistillationAlgorithm, model: nn.Module, window: Window) -> Made:
    materials, place = window.materials, window.place
    teacher: Any = said.teacher
    if teacher == "given":
        if materials.teacher is None:
            place.fail(
                "teacher",
                "give from_recipe(..., teacher=model to learn from), or say 'teacher: copy' for the model as it is now",
            )
        teacher = materials.teacher
    elif teacher == "copy":
        teacher = copy.deepcopy(model).requires_grad_(False)
    wants_inputs = said.config_list is not None
    if wants_inputs:
        materials.need_inputs(place, "a config_list of pairs, matched by their shapes,")

    distiller = Distiller(
        model,
        said.config_list,
        teacher=teacher,
        temperature=window.moving("temperature", said.temperature),
        logits_weight=window.moving("weight", said.weight),
        logits_loss=said.loss,
        logits_options={name: window.moving("options", value) for name, value in said.options.items()},
        class_dim=said.class_dim,
        example_inputs=materials.inputs if wants_inputs else None,
        ema_decay=said.ema_decay,
        cache=said.cache,
        seed=said.seed,
    )
    return distiller, "both"


def _factorization(said: Factorization, model: nn.Module, window: Window) -> Made:
    materials = window.materials
    materials.need_inputs(window.place, "factorization, which counts what layers cost,")
    compressor = LowRankTraining(
        model,
        said.config_list,
        example_inputs=materials.args,
        example_kwargs=materials.kwargs,
        training_steps=window.need_length("the ranks stand"),
        target=None if said.target is None else said.target.model_dump(exclude_none=True),
        width=said.width,
        first_closed=said.first_closed,
        learning_rate=said.learning_rate,
        seed=said.seed,
    )
    return compressor, "start"


def _freezing(said: FreezingAlgorithm, model: nn.Module, window: Window) -> Made:
    return Freezing(model, said.config_list, statistics=said.statistics), "both"


_MAKERS: dict[type[Algorithm], Callable[[Any, nn.Module, Window], Made]] = {
    Pruning: make_pruning,
    Quantization: _quantization,
    Binarization: _binarization,
    DistillationAlgorithm: _distillation,
    Factorization: _factorization,
    FreezingAlgorithm: _freezing,
}
