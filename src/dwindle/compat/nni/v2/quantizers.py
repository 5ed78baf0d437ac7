"""The quantizers of NNI 1.x and 2.x, with their signatures: the user trains, or runs the model, between two calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni import quantizers
from dwindle.compat.nni.calibration import Calibration
from dwindle.compat.nni.observing import Batch
from dwindle.compat.nni.quantizer import ConfigList
from dwindle.compat.nni.v2.following import at_first_call, follow_optimizer
from dwindle.config import resolve
from dwindle.config.errors import ConfigError
from dwindle.config.legacy import DEFAULT_TYPES
from dwindle.quantization import NumberFormat, QuantizationStages, fake_quantize
from dwindle.quantization.aware_training import begin_pass
from dwindle.quantization.weights import weight_levels

KEPT_BATCHES = 32
"""Batches that an observer keeps, at most."""

WEIGHT_OF_EIGHT_BITS = {"target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "symmetric"}


class NaiveQuantizer:
    """Rounds weights to 8 bits with one scale, ``max|w| / 127``; activations stay (NNI cuts where this rounds).

    Args:
        model: The model, changed in place by :meth:`compress`.
        config_list: Which weights; ``quant_bits`` other than 8 are heeded. None takes those of all layers.
        optimizer: Taken and not needed.
    """

    def __init__(
        self, model: nn.Module, config_list: ConfigList | None = None, optimizer: Any | None = None
    ) -> None:
        self.bound_model = model
        if config_list is None:
            config_list = [{"op_types": list(DEFAULT_TYPES), **WEIGHT_OF_EIGHT_BITS}]
        self.forms = {
            target: NumberFormat.parse(setting.quant_dtype, setting.quant_scheme)
            for target, setting in resolve(model, list(map(dict, config_list)), kind="quantization").items()
            if setting.quant_dtype is not None and target.name == "weight"
        }
        if not self.forms:
            raise ConfigError("the config_list quantizes no weight")
        self.layer_scale: dict[str, float] = {}

    def compress(self) -> nn.Module:
        """Round the weights.

        Raises:
            ConfigError: A weight is not finite. Nothing is changed then.
        """
        rounded = {}
        for target, form in self.forms.items():
            weight = self.bound_model.get_submodule(target.module).get_parameter("weight")
            scale, zero_point = weight_levels(weight.detach(), None, form)
            rounded[weight] = fake_quantize(weight.detach(), scale, zero_point, form)
            self.layer_scale[target.module] = float(scale)
        with torch.no_grad():
            for weight, value in rounded.items():
                weight.copy_(value)
        return self.bound_model


class ObserverQuantizer(quantizers.PtqQuantizer):
    """Quantization after training: run the model on some data, then call :meth:`compress`.

    Args:
        model: The model, in evaluation mode; from now on what it is called with is kept (32 batches at most).
        config_list: What to quantize.
        optimizer: Taken and not needed.
    """

    observer = "histogram"

    def __init__(self, model: nn.Module, config_list: ConfigList, optimizer: Any | None = None) -> None:
        super().__init__(model, [_without_arguments(entry) for entry in config_list])
        self.batches: list[Batch] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.batches) < KEPT_BATCHES:
            kept = [value.detach().clone() if torch.is_tensor(value) else value for value in args]
            self.batches.append(dict(kwargs) if kwargs else tuple(kept))

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> nn.Module:
        """Quantize with the ranges of what was seen.

        Raises:
            ConfigError: The model was not run since the quantizer was made.
        """
        if not self.batches:
            raise ConfigError("run the model on some data before compress(): it gives the ranges")
        self._handle.remove()
        return self._quantize(self.batches)[0]


class _Trained(quantizers.Trained):
    """A trained quantizer of 2.x: the user's own loop trains.

    Args:
        model: The model.
        config_list: What to quantize; ``quant_start_step`` of 2.x is read from it, for weights and for activations.
        optimizer: Trains the model; None follows the first one that makes a step.
        dummy_input: Example inputs (a batch of real data, if possible): first ranges are taken from them. None takes
            what the model is called with first.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Any | None = None,
    ) -> None:
        super().__init__(model, [_without_arguments(entry) for entry in config_list])
        self.optimizer, self.dummy_input, self.stages = optimizer, dummy_input, stages_of(config_list)

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> nn.Module:
        """Put the quantizers on the model and follow the optimizer; train the model afterwards."""
        given = self.dummy_input
        if given is None:
            at_first_call(self.bound_model, self._begin_with)
        else:
            self._begin(given if isinstance(given, tuple | dict) else (given,))
        return self.bound_model

    def _begin(self, batch: Batch) -> None:
        follow_optimizer(self.bound_model, self.start([batch]), self.optimizer)

    def _begin_with(self, batch: Batch) -> None:
        """Begin in front of a forward, which is to pass through the quantizers already."""
        self._begin(batch)
        begin_pass(self.bound_model)


class QAT_Quantizer(_Trained):
    """Quantization-aware training with moving averages."""

    def options(self) -> dict[str, Any]:
        """Averages move by a hundredth, as in NNI."""
        return {"options": {"momentum": 0.01}}


class LsqQuantizer(_Trained):
    """Learned step sizes."""

    method = "lsq"

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> nn.Module:
        """Put the quantizers on the model and follow the optimizer; train the model afterwards.

        Raises:
            ConfigError: There is no optimizer, which has to train the steps.
        """
        if self.optimizer is None:
            raise ConfigError(
                "LsqQuantizer needs the optimizer that trains the model: it trains the steps too"
            )
        return super().compress(max_steps, max_epochs)


class DoReFaQuantizer(_Trained):
    """DoReFa's weights and activations."""

    method = "dorefa"


class BNNQuantizer(quantizers.BNNQuantizer):
    """Signs for weights and inputs of layers, and for outputs of what has no weight.

    Args:
        model: The model.
        config_list: What to quantize.
        optimizer: Trains the model; None follows the first one that makes a step.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(model, config_list)
        self.optimizer = optimizer

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> nn.Module:
        """Put the quantizers on the model and follow the optimizer; train the model afterwards."""
        self.own.attach()
        follow_optimizer(self.bound_model, self.own, self.optimizer)
        return self.bound_model


def _without_arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of 2.x without its start, and with one scale for each activation.

    NNI simulates activations with a scale for each channel; no integer kernel has them.
    """
    found = {key: value for key, value in entry.items() if key != "quant_start_step"}
    schemes, types = found.get("quant_scheme"), found.get("quant_types") or ["weight"]
    if isinstance(schemes, str):
        schemes = dict.fromkeys(types, schemes)
    if isinstance(schemes, Mapping):
        wanted = [name for name in types if name not in ("weight", "bias")]
        if any(str(schemes.get(name, "")).startswith("per_channel") for name in wanted):
            warnings.warn(
                f"quant_scheme: {', '.join(wanted)} have one scale for all channels: integer kernels add products of "
                "all channels",
                stacklevel=4,
            )
        found["quant_scheme"] = {
            name: str(value).replace("per_channel", "per_tensor") if name in wanted else value
            for name, value in schemes.items()
        }
    return found


def stages_of(config_list: ConfigList) -> QuantizationStages:
    """Return the steps from which on a list of 2.x rounds weights, and from which on activations.

    Activations that no entry names are those of layers whose weights are named; they begin with them. Where entries
    for one kind have several starts, the last counts.
    """
    starts: dict[bool, set[int]] = {True: set(), False: set()}
    for entry in config_list:
        for name in entry.get("quant_types") or ["weight"]:
            starts[name == "weight"].add(int(entry.get("quant_start_step", 0)))
    for of_weights, found in starts.items():
        if len(found) > 1:
            kind = "weights" if of_weights else "inputs and outputs"
            warnings.warn(
                f"quant_start_step: {kind} have several starts, {sorted(found)}; all begin at {max(found)}",
                stacklevel=4,
            )
    weights = max(starts[True], default=0)
    return QuantizationStages(weights, max(starts[False], default=weights))


__all__ = [
    "BNNQuantizer",
    "Calibration",
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "QAT_Quantizer",
]
