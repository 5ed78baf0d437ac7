"""NNI's binary quantizer, with the signature of 3.0."""

from __future__ import annotations

from typing import Any

from torch import nn

from dwindle import quantization
from dwindle.compat.nni.calibration import Calibration
from dwindle.compat.nni.chain import run_chain
from dwindle.compat.nni.evaluator import Evaluator, checked_evaluator
from dwindle.compat.nni.quantizer import ConfigList, Quantizer
from dwindle.config import resolve
from dwindle.config.errors import ConfigError
from dwindle.training import Compressor


class BNNQuantizer(Quantizer):
    """Signs for weights and inputs of layers, and for outputs of what has no weight, whatever the ``quant_dtype``.

    https://arxiv.org/abs/1602.02830

    ``dwindle.pack_binary`` makes the result real.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        existed_wrappers: Any | None = None,
    ) -> None:
        self.bound_model, self.evaluator = model, checked_evaluator(evaluator)
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


def _binary_config(model: nn.Module, config_list: ConfigList) -> list[dict[str, Any]]:
    """Return a config of one bit for what another names."""
    names: dict[str, list[str]] = {}
    for target, setting in resolve(
        model, [dict(entry) for entry in config_list], kind="quantization"
    ).items():
        has_weight = "weight" in model.get_submodule(target.module)._parameters
        wanted = ("weight", "_input_0") if has_weight else ("_output_0",)
        if setting.quant_dtype is not None and target.name in wanted:
            names.setdefault(target.module, []).append(target.name)
    return [
        {"op_names": [module], "target_names": targets, "quant_dtype": "int1"}
        for module, targets in names.items()
    ]
