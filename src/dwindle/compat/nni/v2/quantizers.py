"""The quantizers of NNI 1.x and 2.x, with their signatures: the user trains, or runs the model, between two calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni import quantizers
from dwindle.compat.nni.observing import Batch
from dwindle.compat.nni.quantizers import Calibration, ConfigList
from dwindle.config import resolve
from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, fake_quantize
from dwindle.quantization.weights import weight_levels
from dwindle.training import CompressionRun, Compressor

KEPT_BATCHES = 32
"""Batches that an observer keeps, at most."""


class NaiveQuantizer:
    """Rounds weights to 8 bits with one scale, ``max|w| / 127``; activations stay (NNI cuts where this rounds).

    Args:
        model: The model, changed in place by :meth:`compress`.
        config_list: Which weights; ``quant_bits`` other than 8 are heeded.
        optimizer: Taken and not needed.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, optimizer: Any | None = None) -> None:
        self.bound_model = model
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
        super().__init__(model, config_list)
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


class _Patched:
    """What 2.x does for quantizers that train: the optimizer's steps are followed, the user's own loop trains."""

    bound_model: nn.Module
    own: Any
    optimizer: torch.optim.Optimizer | None

    def _begin(self, own: Compressor) -> nn.Module:
        optimizer = self.optimizer
        if optimizer is None:
            raise ConfigError(f"{type(self).__name__} needs the optimizer that trains the model")
        CompressionRun(self.bound_model, [own]).add_parameters_to(optimizer)
        optimizer.register_step_post_hook(lambda *_: own.step())
        return self.bound_model


class _Trained(_Patched, quantizers._Trained):
    """A trained quantizer of 2.x.

    Args:
        model: The model.
        config_list: What to quantize; ``quant_start_step`` of 2.x is read from it.
        optimizer: Trains the model; learned scales are added to it.
        dummy_input: Example inputs (a batch of real data, if possible): first ranges are taken from them.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Any | None = None,
    ) -> None:
        starts = [int(entry["quant_start_step"]) for entry in config_list if "quant_start_step" in entry]
        entries = [{key: entry[key] for key in entry if key != "quant_start_step"} for entry in config_list]
        super().__init__(model, entries)
        self.optimizer, self.dummy_input, self.start_step = optimizer, dummy_input, max(starts, default=0)

    def compress(  # type: ignore[override]
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> nn.Module:
        """Put the quantizers on the model and follow the optimizer; train the model afterwards.

        Raises:
            ConfigError: There is no ``dummy_input`` or no optimizer.
        """
        given = self.dummy_input
        if given is None:
            raise ConfigError(f"{type(self).__name__} needs dummy_input: first ranges are taken from it")
        if self.optimizer is None:
            raise ConfigError(f"{type(self).__name__} needs the optimizer that trains the model")
        return self._begin(self.start([given if isinstance(given, tuple | dict) else (given,)]))


class QAT_Quantizer(_Trained):
    """Quantization-aware training with moving averages."""

    def options(self) -> dict[str, Any]:
        """Averages move by a hundredth, as in NNI."""
        return {"options": {"momentum": 0.01}}


class LsqQuantizer(_Trained):
    """Learned step sizes."""

    method = "lsq"


class DoReFaQuantizer(_Trained):
    """DoReFa's weights and activations."""

    method = "dorefa"


class BNNQuantizer(_Patched, quantizers.BNNQuantizer):
    """Signs for weights and inputs.

    Args:
        model: The model.
        config_list: What to quantize.
        optimizer: Trains the model.
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
        if self.optimizer is None:
            raise ConfigError("BNNQuantizer needs the optimizer that trains the model")
        self.own.attach()
        return self._begin(self.own)


__all__ = [
    "BNNQuantizer",
    "Calibration",
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "QAT_Quantizer",
]
