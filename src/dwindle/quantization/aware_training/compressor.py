"""Quantization-aware training of any model, as a compressor: bits, stages, and one published method."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.quantization.aware_training.bank import (
    TrainedQuantizers,
    WatchedRange,
    attach_bank,
    bank_of,
    detach_bank,
)
from dwindle.quantization.aware_training.conversion import finish_training
from dwindle.quantization.aware_training.placing import Bits, TrainingPlaces, find_places
from dwindle.quantization.aware_training.stages import QuantizationStages
from dwindle.quantization.aware_training.starting import share_state, start_all, start_watched
from dwindle.quantization.calls import CallKey, without_nan
from dwindle.quantization.folding import is_transposed
from dwindle.quantization.operators import Backend
from dwindle.quantization.overrides import overrides_from_config
from dwindle.quantization.places import WeightPlace
from dwindle.quantization.quantizers import METHODS, PactQuantizer, Quantizer, make_quantizer
from dwindle.quantization.simulation import is_quantized
from dwindle.training.claims import Claim
from dwindle.training.inputs import Inputs, forward_inputs, input_batches

START_BATCHES = 8
"""Batches of calibration data that first ranges are taken from, where nothing else is asked for."""


class TrainingQuantizer:
    """Rounds weights and activations while a model trains, where its integer file will round them.

    A compressor for :func:`dwindle.compress` and :func:`dwindle.training.fit`. Quantizers stand where the runtime's
    kernels round (behind a convolution with its normalization and activation, on what a layer reads), so that what was
    trained is what runs. Batch normalization is folded exactly: one scale for each output channel commutes with the
    fold; a weight with one scale is rounded as the folded weight (Jacob et al. 2018, arXiv 1712.05877).

    The quantizers stay on the model behind the run: its accuracy in evaluation is that of the integer model.
    :meth:`finish` gives that model, ready for ``dwindle.export``; :meth:`withdraw` takes the quantizers off.

    Args:
        model: The model, changed in place when the run begins.
        config_list: Other settings for single targets (``quant_dtype``, ``quant_scheme``, ``granularity``), as in
            :func:`dwindle.quantize`; ``quant_dtype: None`` leaves a target in float.
        calibration_data: Batches for the first ranges: tensors, tuples (labels are left out) or mappings.
        method: ``"qat"`` (moving averages, straight through), ``"lsq"``, ``"lsq_plus"``, ``"pact"``, ``"tqt"``,
            ``"symmetric_range"``, ``"asymmetric_range"`` or ``"dorefa"``; see
            :data:`dwindle.quantization.quantizers.METHODS`.
        bits: Bits where the config_list says nothing: a number for weights and activations, or :class:`Bits`. The
            first and the last layer have 8.
        stages: When what starts.
        backend: Whose operators run in integers: ``"onnxruntime"`` (the default for 8 bits), ``"openvino"``, or
            ``"layers"`` (the default for fewer: inputs and weights of layers, as papers on few bits have it).
        example_inputs: Arguments to record the model with; the first batch of the calibration data when not given.
        observer: How first ranges of activations are found: ``"histogram"``, ``"minmax"``, ``"percentile"``, ...
        max_batches: Read so many batches of the calibration data.
        avoid_saturation: Keep 8-bit weights to 127 levels where older processors would add products of more without
            room; see :func:`dwindle.quantize`.
        gradient_bits: Round the gradients that come back to each layer's output too (DoReFa), to so many bits.
        penalty: Factor of PACT's penalty on its clips in the loss.
        options: More arguments of the method's quantizers of activations, such as ``momentum`` for ``"qat"``.

    Raises:
        ConfigError: A name, a target, a number format or the calibration data do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]] | None = None,
        *,
        calibration_data: Any,
        method: str = "qat",
        bits: int | Bits = 8,
        stages: QuantizationStages | None = None,
        backend: str | Backend | None = None,
        example_inputs: Any = None,
        observer: Any = "histogram",
        max_batches: int = START_BATCHES,
        avoid_saturation: bool = True,
        gradient_bits: int | None = None,
        penalty: float = 2e-4,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(
                f"method {method!r} is not known: {', '.join(METHODS)}{did_you_mean(method, METHODS)}"
            )
        if is_quantized(model):
            raise ConfigError("this model is quantized already; train the original instead")
        self.model, self.method = model, method
        self.bits = Bits(bits, bits) if isinstance(bits, int) else bits
        self.stages = stages or QuantizationStages()
        self.steps, self.penalty, self.observer = 0, penalty, observer
        self._gradient_bits, self._options = gradient_bits, dict(options or {})
        overrides = overrides_from_config(model, config_list)
        limited = itertools.islice(
            input_batches(model, calibration_data, None, None, "calibration_data"), max_batches
        )
        self._batches: list[Inputs] = [without_nan(own, "calibration_data") for own in limited]
        example = self._batches[0]
        if example_inputs is not None:
            example = forward_inputs(model, example_inputs, lambda batch: batch)
        self.places = find_places(model, example, overrides, self.bits, backend, avoid_saturation)
        self.bank: TrainedQuantizers | None = None
        self._was_there = False
        self._make()  # what does not fit shows before anything is changed

    # The contract of a compressor.

    def attach(self) -> None:
        """Put the quantizers on the model, with ranges from the calibration data.

        Raises:
            ConfigError: Data or weights hold NaN or infinity, or others' quantizers are there. The model is as it was.
        """
        if bank_of(self.model) is not None:
            if self.bank is bank_of(self.model):
                self._was_there = True
                return
            raise ConfigError("the model is trained with other quantizers already; withdraw those first")
        self.bank = self._make().to(next(self.model.parameters()).device)
        start_all(self.model, self.bank, self._batches, self.observer)
        attach_bank(self.model, self.bank)
        self._was_there = False
        self._move()

    def step(self) -> None:
        """The optimizer has made one step.

        Raises:
            DwindleError: The ranges that were watched hold NaN or infinity.
        """
        self.steps += 1
        if self.steps == self.stages.activations:
            try:
                start_watched(self._attached())
            except ConfigError as error:
                raise DwindleError(str(error)) from error
        if self.steps > self.stages.activations:
            self._attached().keep_ends()
        self._move()

    def loss(self) -> Tensor | float:
        """PACT's penalty on its clips; 0.0 for other methods."""
        bank = bank_of(self.model)
        clips = (
            [own for own in bank.activations if isinstance(own, PactQuantizer)] if bank is not None else []
        )
        if not clips or not self.penalty:
            return 0.0
        return self.penalty * torch.stack([own.penalty() for own in clips]).sum()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Learned scales and offsets."""
        bank = bank_of(self.model)
        if bank is not None:
            yield from (own for own in bank.parameters() if own.requires_grad)

    def parameter_options(self) -> dict[str, Any]:
        """Options of their group in an optimizer."""
        return {"weight_decay": 0.0}

    def claims(self) -> Iterator[Claim]:
        """Yield the parameters that are rounded."""
        for name in sorted({found.name for found in self.places.training.weights.values()}):
            yield Claim(Target.parse(name), "quantize")

    def rest(self) -> None:
        """Let all ranges stand as they are."""
        self._attached().freeze_ranges()

    def status(self) -> dict[str, float]:
        """Return whether weights and activations are rounded by now."""
        bank = bank_of(self.model)
        if bank is None:
            return {}
        return {
            "rounds_weights": float(bank.rounds_weights),
            "rounds_activations": float(bank.rounds_activations),
        }

    def detach(self) -> None:
        """End the run. The quantizers stay, as they are what was trained; all processes take the first one's ranges.

        When an exception ends it, quantizers that it put on the model go.
        """
        bank, failed = bank_of(self.model), sys.exc_info()[0] is not None
        if bank is None:
            return
        bank.watches = False
        if not failed:
            share_state(bank)
        elif not self._was_there:
            detach_bank(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on; the quantizers' own state is in the model's."""
        return {"steps": self.steps, "watched": self._watched()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        if "steps" not in state:
            raise ConfigError("the state of a TrainingQuantizer needs 'steps'")
        self.steps = int(state["steps"])
        bank = bank_of(self.model)
        if bank is not None:
            for number, (low, high, sample) in state.get("watched", {}).items():
                seen = bank.watched[int(number)]
                assert isinstance(seen, WatchedRange)
                seen.low.copy_(low)
                seen.high.copy_(high)
                seen.sample = sample.to(low.device)
            self._move()

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up: it can."""
        return None

    # More.

    def finish(self) -> nn.Module:
        """Return the integer model, see :func:`dwindle.quantization.finish_training`."""
        return finish_training(self.model)

    def withdraw(self) -> nn.Module:
        """Take the quantizers off again; the weights stay as the optimizer has them."""
        detach_bank(self.model)
        return self.model

    # Inside.

    def _attached(self) -> TrainedQuantizers:
        bank = bank_of(self.model)
        if bank is None:
            raise ConfigError(
                "the quantizers are not on the model: enter dw.compress(model, [quantizer]) first"
            )
        return bank

    def _watched(self) -> dict[str, list[Tensor]]:
        """Return what was seen of activations that are being watched, by their number."""
        bank = bank_of(self.model)
        if bank is None or not bank.watches:
            return {}
        watched = [own for own in bank.watched if isinstance(own, WatchedRange)]
        return {
            str(number): [seen.low.clone(), seen.high.clone(), seen.sample]
            for number, seen in enumerate(watched)
            if seen.sample is not None
        }

    def _move(self) -> None:
        """Set what the step that comes next does."""
        bank, stages = self._attached(), self.stages
        bank.rounds_weights = self.steps >= stages.weights
        bank.rounds_activations = self.steps >= stages.activations
        bank.watches = stages.activations - stages.watch <= self.steps < stages.activations
        freeze = stages.freeze_normalization
        bank.normalization_frozen = freeze is not None and self.steps >= freeze
        if stages.freeze_ranges is not None and self.steps >= stages.freeze_ranges:
            bank.freeze_ranges()

    def _make(self) -> TrainedQuantizers:
        """Return new quantizers, without ranges."""
        places, placement = self.places, self.places.training
        activations = [
            self._quantizer(form, None, name, activation=True)
            for name, form in zip(placement.names, placement.forms, strict=True)
        ]
        weights: list[Quantizer] = []
        known: dict[Any, int] = {}
        weight_of, folded_first = {}, {}
        for key, found in placement.weights.items():
            own = (found.name, found.form, found.axis)
            if own not in known:
                known[own] = len(weights)
                weights.append(self._quantizer(found.form, found.axis, found.name, activation=False, key=key))
            weight_of[key] = known[own]
            normalization = places.normalization_of.get(key.module)
            if normalization is not None and not self._commutes(key, found, weights[known[own]]):
                folded_first[key] = (key.module, normalization)
        return TrainedQuantizers(places, activations, weights, weight_of, folded_first, self._gradient_bits)

    def _quantizer(
        self, form: Any, axis: int | None, name: str, *, activation: bool, key: CallKey | None = None
    ) -> Quantizer:
        method, options = self.method, dict(self._options) if activation else {}
        if method == "dorefa":
            if (activation and form.highest == 255) or (key is not None and key.module in self.places.ends):
                method = "qat"  # the paper leaves the first and the last layer alone
            elif not activation:
                axis = None
                if name in self.places.borrowed:
                    raise ConfigError(
                        f"{name} is read in float elsewhere, and DoReFa changes what it is; leave it out"
                    )
        try:
            return make_quantizer(method, form, axis, activation=activation, **options)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{name}: {error}") from error

    def _commutes(self, key: CallKey, found: WeightPlace, quantizer: Quantizer) -> bool:
        """Say whether rounding before folding gives levels that one scale for each channel describes behind it."""
        layer = self.model.get_submodule(key.module)
        transposed = is_transposed(layer)
        if transposed and layer.groups > 1:  # type: ignore[operator]
            return False
        per_channel = found.axis == (1 if transposed else 0)
        return per_channel and quantizer.axis in (found.axis, None)


__all__ = ["Bits", "QuantizationStages", "TrainingPlaces", "TrainingQuantizer", "finish_training"]
