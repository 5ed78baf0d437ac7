"""The quantizers of NNI 3.0, with their signatures, on dwindle's places, quantizers and integer models.

Only what the config names is quantized. A layer whose weight is named reads an activation in integers too (no runtime
multiplies one integer operand), by default uint8.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dwindle import quantization
from dwindle.compat.nni.chain import Chained, run_chain
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.compat.nni.observing import Batch, observed_batches
from dwindle.config import resolve
from dwindle.config.errors import ConfigError
from dwindle.quantization.overrides import overrides_from_config
from dwindle.training import Compressor

ConfigList = Sequence[Mapping[str, Any]]
Calibration = dict[str, dict[str, dict[str, Any]]]

START_BATCHES = 8
"""Batches of the evaluator's loop that first ranges are taken from."""


class Quantizer(Chained):
    """A quantizer of dwindle with the calls of NNI's.

    Args:
        model: The model, quantized in place.
        config_list: As in NNI 3.0, or a list of 2.x, which is translated.
        evaluator: Brings the data, and trains.
        existed_wrappers: Taken and not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        if evaluator is not None and not isinstance(evaluator, Evaluator):
            raise ConfigError(f"evaluator must be an evaluator, got a {type(evaluator).__name__}")
        self.bound_model, self.evaluator = model, evaluator
        self.config_list = only_named(model, config_list)

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Calibration]:
        """Quantize.

        Args:
            max_steps: Steps of the training, or batches to observe.
            max_epochs: Epochs of the training.

        Returns:
            The model, which simulates from now on, and scales and zero points by module and target.
        """
        raise NotImplementedError

    def integer_model(self) -> nn.Module:
        """Return the model as :func:`dwindle.export` takes it, in evaluation mode."""
        raise NotImplementedError

    def unwrap_model(self) -> nn.Module:
        """Return the model without simulation."""
        raise NotImplementedError

    def get_calibration_config(self) -> Calibration:
        """Return scales and zero points by module and target."""
        return calibration_of(self.integer_model())

    def export_model(
        self,
        model_path: str | Path,
        calibration_path: str | Path | None = None,
        onnx_path: str | Path | None = None,
        input_shape: Sequence[int] | None = None,
        device: Any | None = None,
    ) -> Calibration:
        """Save the integer model's ``state_dict``, the calibration, and a real int8 ONNX file.

        Args:
            model_path: Gets the ``state_dict``.
            calibration_path: Gets the calibration.
            onnx_path: Gets the int8 model; NNI wrote a float one.
            input_shape: Shape of the example input, for ``onnx_path``.
            device: Taken and not needed.

        Raises:
            ConfigError: There is no shape for the ONNX file.
        """
        model = self.integer_model()
        calibration = calibration_of(model)
        torch.save(model.state_dict(), model_path)
        if calibration_path is not None:
            torch.save(calibration, calibration_path)
        if onnx_path is not None:
            if input_shape is None:
                raise ConfigError("export_model needs input_shape for an ONNX file")
            from dwindle.export import export

            device = next(model.parameters()).device
            export(model, onnx_path, torch.randn(tuple(input_shape), device=device))
        return calibration


class PtqQuantizer(Quantizer):
    """Quantization after training: ranges are the smallest and largest values seen.

    Args:
        model: The model.
        config_list: What to quantize.
        evaluator: Its loop brings the data; the model is not trained by it.
        existed_wrappers: Taken and not needed.
        is_bias_correction: Put every channel's mean back where it was.
    """

    observer = "minmax"

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
        is_bias_correction: bool = False,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self.is_bias_correction = is_bias_correction
        self._float: nn.Module | None = None

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Calibration]:
        """Observe and quantize; those that it was made from do their work before."""
        if self.fused_compressors:
            training = any(own.trains for own in self.fused_compressors)
            run_chain(self.fused_compressors, *((max_steps, max_epochs) if training else (None, None)))
        batches = observed_batches(self.bound_model, self.evaluator, max_steps or 32, max_epochs)
        return self._quantize(batches)

    def _start(self, evaluator: Evaluator) -> Compressor | None:
        raise ConfigError(f"{type(self).__name__} does not train; make it the last of a chain of compressors")

    def _alone(self) -> None:
        self.compress()

    def _quantize(self, batches: list[Batch]) -> tuple[nn.Module, Calibration]:
        made = quantization.quantize(
            self.bound_model,
            batches,
            config_list=self.config_list,
            observer=self.observer,
            bias_correction=self.is_bias_correction,
        )
        self._float = copy.deepcopy(self.bound_model)
        become(self.bound_model, made)
        return self.bound_model, calibration_of(made)

    def integer_model(self) -> nn.Module:
        """Return the quantized model."""
        return self.bound_model

    def unwrap_model(self) -> nn.Module:
        """Return a copy of the float model; batch normalization is folded in the quantized one."""
        return self.bound_model if self._float is None else self._float


class _Trained(Quantizer):
    """A quantizer that takes part in the training."""

    method: ClassVar[str] = "qat"
    start_step = 0
    own: quantization.TrainingQuantizer | None = None
    _batches: Sequence[Batch] = ()

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Calibration]:
        """Train with quantizers.

        Raises:
            ConfigError: There is no evaluator, or its loop does not call the model.
        """
        run_chain([*self.fused_compressors, self], max_steps, max_epochs)
        return self.bound_model, self.get_calibration_config()

    def _before(self, evaluator: Evaluator) -> None:
        self._batches = observed_batches(self.bound_model, evaluator, START_BATCHES)

    def _start(self, evaluator: Evaluator) -> Compressor:
        batches, self._batches = list(self._batches), ()
        return self.start(batches)

    def _end(self, steps: int) -> None:
        assert self.own is not None
        self.own.detach()

    def _withdraw(self) -> None:
        if self.own is not None:
            self.own.withdraw()

    def start(self, batches: list[Batch]) -> quantization.TrainingQuantizer:
        """Put the quantizers on the model."""
        stages = quantization.QuantizationStages(weights=self.start_step, activations=self.start_step)
        self.own = quantization.TrainingQuantizer(
            self.bound_model,
            self.config_list,
            calibration_data=batches,
            method=self.method,
            stages=stages,
            **self.options(),
        )
        self.own.attach()
        return self.own

    def options(self) -> dict[str, Any]:
        """Further arguments of :class:`dwindle.quantization.TrainingQuantizer`."""
        return {}

    def integer_model(self) -> nn.Module:
        """Return the integer model of what was trained."""
        return quantization.finish_training(self.bound_model)

    def unwrap_model(self) -> nn.Module:
        """Take the quantizers off; weights stay as they were trained."""
        return self.bound_model if self.own is None else self.own.withdraw()


class QATQuantizer(_Trained):
    """Quantization-aware training with moving averages (https://arxiv.org/abs/1712.05877).

    Args:
        model: The model.
        config_list: What to quantize.
        evaluator: Trains.
        quant_start_step: Steps in float before.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        quant_start_step: int = 0,
        existed_wrappers: Any | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        if isinstance(quant_start_step, bool) or quant_start_step < 0:
            raise ConfigError(f"quant_start_step {quant_start_step!r} is not a number of steps")
        self.start_step = quant_start_step

    def options(self) -> dict[str, Any]:
        """Averages move by a hundredth, as in NNI."""
        return {"options": {"momentum": 0.01}}


class LsqQuantizer(_Trained):
    """Learned step sizes, with the paper's first steps (https://arxiv.org/abs/1902.08153)."""

    method = "lsq"


class LsqPlusQuantizer(_Trained):
    """Learned step sizes and offsets, with the paper's first ones (https://arxiv.org/abs/2004.09576)."""

    method = "lsq_plus"


class DoReFaQuantizer(_Trained):
    """DoReFa for weights, activations and gradients (https://arxiv.org/abs/1606.06160); first and last layer as in QAT.

    Args:
        model: The model.
        config_list: What to quantize.
        evaluator: Trains.
        gradient_bits: Bits of the gradients; None leaves them.
    """

    method = "dorefa"

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
        gradient_bits: int | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self.gradient_bits = gradient_bits

    def options(self) -> dict[str, Any]:
        """Bits of gradients."""
        return {"gradient_bits": self.gradient_bits}


class BNNQuantizer(Quantizer):
    """Signs for weights and inputs (https://arxiv.org/abs/1602.02830); whatever the config's ``quant_dtype``.

    ``dwindle.pack_binary`` makes the result real.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        self.bound_model, self.evaluator = model, evaluator
        self.config_list = _binary_config(model, config_list)
        self.own = quantization.BNNQuantizer(model, self.config_list)

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Calibration]:
        """Train with signs.

        Raises:
            ConfigError: There is no evaluator.
        """
        run_chain([*self.fused_compressors, self], max_steps, max_epochs)
        return self.bound_model, {}

    def _start(self, evaluator: Evaluator) -> Compressor:
        self.own.attach()
        return self.own

    def _end(self, steps: int) -> None:
        self.own.detach()

    def _withdraw(self) -> None:
        self.own.withdraw()

    def integer_model(self) -> nn.Module:
        """Say what to do instead.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a binary model has no scales to export: dwindle.pack_binary(model) makes it real")

    def unwrap_model(self) -> nn.Module:
        """Take the quantizers off."""
        self.own.withdraw()
        return self.bound_model


def only_named(model: nn.Module, config_list: ConfigList) -> list[dict[str, Any]]:
    """Return a config that leaves in float what the given one does not name.

    Args:
        model: The model.
        config_list: The user's.

    Raises:
        ConfigError: It is not valid, or names nothing.
    """
    entries = [dict(entry) for entry in config_list]
    settings = overrides_from_config(model, entries).settings
    named = {
        module
        for module, targets in settings.items()
        if any(setting.form is not None for setting in targets.values())
    }
    if not named:
        raise ConfigError("the config_list quantizes nothing")
    rest = [
        name
        for name, module in model.named_modules()
        if name and name not in named and any(own.dim() > 1 for own in module.parameters(recurse=False))
    ]
    floats = {"op_names": rest, "target_names": ["_input_0"], "quant_dtype": None}
    return [*entries, *([floats] if rest else [])]


def _binary_config(model: nn.Module, config_list: ConfigList) -> list[dict[str, Any]]:
    """Return a config of one bit for what another names."""
    names: dict[str, list[str]] = {}
    for target, setting in resolve(
        model, [dict(entry) for entry in config_list], kind="quantization"
    ).items():
        if setting.quant_dtype is not None and target.name in ("weight", "_input_0"):
            names.setdefault(target.module, []).append(target.name)
    return [
        {"op_names": [module], "target_names": targets, "quant_dtype": "int1"}
        for module, targets in names.items()
    ]


def become(model: nn.Module, made: nn.Module) -> None:
    """Make a float model the quantized one that was made of a copy of it, in place."""
    quantization.apply_plan(model, quantization.plan_of(made))
    model.load_state_dict(made.state_dict())


def calibration_of(model: nn.Module) -> Calibration:
    """Return scales and zero points of an integer model in NNI's form.

    Args:
        model: What :func:`dwindle.quantize` made.

    Returns:
        ``{module: {target: {"scale", "zero_point", "quant_dtype", "quant_scheme", "quant_bits", "tracked_min",
        "tracked_max"}}}``.
    """
    from dwindle.quantization.simulation import simulation_of

    simulation = simulation_of(model)
    scale, zero_point, weight_scale, weight_zero_point = quantization.quantization_parameters(model)
    found: Calibration = {}
    for key, slot in simulation.slots.items():
        part, place = slice(slot.start, slot.start + slot.length), slot.place
        number = place.input_quantizer
        found.setdefault(key.module, {})["weight"] = _entry(
            weight_scale[part], weight_zero_point[part], place.form
        )
        found[key.module]["_input_0"] = _entry(scale[number], zero_point[number], simulation.forms[number])
    for key, number in simulation.placement.outputs.items():
        if key.module:
            form = simulation.forms[number]
            found.setdefault(key.module, {})["_output_0"] = _entry(scale[number], zero_point[number], form)
    return found


def _entry(scale: torch.Tensor, zero_point: torch.Tensor, form: quantization.NumberFormat) -> dict[str, Any]:
    return {
        "scale": scale.clone(),
        "zero_point": zero_point.clone(),
        "quant_dtype": f"{'' if form.signed else 'u'}int{form.bits}",
        "quant_scheme": "symmetric" if form.symmetric else "affine",
        "quant_bits": form.bits,
        "tracked_min": (form.lowest - zero_point) * scale,
        "tracked_max": (form.highest - zero_point) * scale,
    }
