"""What all quantizers under NNI's names have: ``compress``, ``unwrap_model``, calibration, files.

Only what the config names is quantized. A layer whose weight is named reads an activation in integers too (no runtime
multiplies one integer operand), by default uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni.calibration import Calibration, Settings, calibration_of
from dwindle.compat.nni.chain import Chained
from dwindle.compat.nni.evaluator import Evaluator, checked_evaluator
from dwindle.config.errors import ConfigError
from dwindle.quantization.overrides import overrides_from_config

ConfigList = Sequence[Mapping[str, Any]]


class Quantizer(Chained):
    """A quantizer of dwindle with the calls of NNI's.

    Args:
        model: The model, quantized in place.
        config_list: As in NNI 3.0, or a list of 2.x, which is translated.
        evaluator: Brings the data, and trains.
        existed_wrappers: Taken and not needed.

    Attributes:
        settings: What the config says, by module and target.
    """

    settings: Settings

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        self.bound_model, self.evaluator = model, checked_evaluator(evaluator)
        self.settings = named_settings(model, config_list)
        self.config_list = [*map(dict, config_list), *_others_in_float(model, self.settings)]

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
        return calibration_of(self.integer_model(), self.settings)

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
        calibration = calibration_of(model, self.settings)
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


def named_settings(model: nn.Module, config_list: ConfigList) -> Settings:
    """Return what a config says, by module and target.

    Raises:
        ConfigError: It is not valid, or quantizes nothing.
    """
    settings = overrides_from_config(model, [dict(entry) for entry in config_list]).settings
    if not any(setting.form is not None for targets in settings.values() for setting in targets.values()):
        raise ConfigError("the config_list quantizes nothing")
    return settings


def _others_in_float(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return an entry that leaves in float what a config does not name."""
    named = {
        module
        for module, targets in settings.items()
        if any(setting.form is not None for setting in targets.values())
    }
    rest = [
        name
        for name, module in model.named_modules()
        if name and name not in named and any(own.dim() > 1 for own in module.parameters(recurse=False))
    ]
    return [{"op_names": rest, "target_names": ["_input_0"], "quant_dtype": None}] if rest else []
