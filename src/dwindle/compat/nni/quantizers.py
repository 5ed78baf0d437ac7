"""The quantizers of NNI 3.0, with their signatures, on dwindle's places, quantizers and integer models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from dwindle import quantization
from dwindle.compat.nni.binary import BNNQuantizer
from dwindle.compat.nni.calibration import Calibration, become, calibration_of
from dwindle.compat.nni.chain import run_chain
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.compat.nni.observing import Batch, observed_batches
from dwindle.compat.nni.quantizer import ConfigList, Quantizer
from dwindle.config.errors import ConfigError
from dwindle.training import Compressor

__all__ = [
    "BNNQuantizer",
    "DoReFaQuantizer",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "PtqQuantizer",
    "QATQuantizer",
    "Trained",
]

START_BATCHES = 8
"""Batches of the evaluator's loop that first ranges are taken from."""


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
        return self.bound_model, calibration_of(made, self.settings)

    def integer_model(self) -> nn.Module:
        """Return the quantized model."""
        return self.bound_model

    def unwrap_model(self) -> nn.Module:
        """Return a copy of the float model; batch normalization is folded in the quantized one."""
        return self.bound_model if self._float is None else self._float


class Trained(Quantizer):
    """A quantizer that takes part in the training."""

    method: ClassVar[str] = "qat"
    stages = quantization.QuantizationStages()
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
        self.own = quantization.TrainingQuantizer(
            self.bound_model,
            self.config_list,
            calibration_data=batches,
            method=self.method,
            stages=self.stages,
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


class QATQuantizer(Trained):
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
        self.stages = quantization.QuantizationStages(quant_start_step, quant_start_step)

    def options(self) -> dict[str, Any]:
        """Averages move by a hundredth, as in NNI."""
        return {"options": {"momentum": 0.01}}


class LsqQuantizer(Trained):
    """Learned step sizes, with the paper's first steps (https://arxiv.org/abs/1902.08153)."""

    method = "lsq"


class LsqPlusQuantizer(Trained):
    """Learned step sizes and offsets, with the paper's first ones (https://arxiv.org/abs/2004.09576)."""

    method = "lsq_plus"


class DoReFaQuantizer(Trained):
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
