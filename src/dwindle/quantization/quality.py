"""Everything about what quantization cost a model: its output, its layers worst first, the values behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dwindle.quantization.calls import tensors_in
from dwindle.quantization.layer_errors import LayerError, error_table, layer_errors
from dwindle.quantization.parity import Parity, compare
from dwindle.quantization.simulation import simulation_of
from dwindle.quantization.value_histograms import ValueHistogram, value_histograms
from dwindle.training.inputs import Inputs, input_batches


@dataclass(frozen=True)
class QuantizationReport:
    """What quantization cost.

    Attributes:
        output: The quantized model's first output against the float model's.
        layers: Every quantized layer, that of the lowest signal to noise first.
        histograms: What each quantizer sees, with its range.
    """

    output: Parity
    layers: list[LayerError]
    histograms: list[ValueHistogram]

    def to_json(self, worst: int | None = None) -> dict[str, Any]:
        """Return plain data.

        Args:
            worst: Histograms of so many of the worst layers only; None for all.
        """
        histograms = self.histograms if worst is None else self.histograms_of(self.layers[:worst])
        return {
            "output": self.output.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "histograms": [histogram.to_json() for histogram in histograms],
        }

    def histograms_of(self, layers: Sequence[LayerError]) -> list[ValueHistogram]:
        """Return the histograms of what some layers read, in their order: input, weight, input, weight."""
        known = {histogram.name: histogram for histogram in self.histograms}
        names = dict.fromkeys(name for layer in layers for name in (layer.input_name, layer.weight_name))
        return [known[name] for name in names if name in known]

    def table(self) -> str:
        """Return the layers as a text table below a line about the output."""
        equal, ratio = self.output.equal_predictions, self.output.sqnr_db
        return f"output: {ratio:.2f} dB, {equal:.2%} equal predictions\n\n{error_table(self.layers)}"


def quantization_report(
    model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    bins: int = 64,
) -> QuantizationReport:
    """Say what quantization cost a model, layer by layer.

    Args:
        model: The float model that was quantized.
        quantized: What :func:`dwindle.quantize` made of it (not read back from a file, where scales were moved between
            layers; see :func:`dwindle.quantization.layer_errors`).
        data: Batches, as :func:`dwindle.quantize` takes them; they are kept while the report is made.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Read at most so many batches.
        bins: Bins of each histogram, at most.

    Raises:
        ConfigError: ``quantized`` was not made by dwindle or not of this model, or there are no batches.
    """
    simulation_of(quantized)
    batches = list(input_batches(model, data, adapt, max_batches))
    whole = [kwargs or args for args, kwargs in batches]
    return QuantizationReport(
        _outputs(model, quantized, batches),
        layer_errors(model, quantized, whole, adapt=_as_it_is),
        value_histograms(model, quantized, whole, adapt=_as_it_is, bins=bins),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _outputs(model: nn.Module, quantized: nn.Module, batches: list[Inputs]) -> Parity:
    """Compare the first outputs of two models."""
    pairs = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for args, kwargs in batches:
                pairs.append(
                    [
                        next(tensors_in(own(*args, **kwargs))).double().cpu().numpy()
                        for own in (model, quantized)
                    ]
                )
    finally:
        model.train(training)
    reference, other = (np.concatenate([_rows(pair[side]) for pair in pairs]) for side in (0, 1))
    return compare(reference, other)


def _rows(values: np.ndarray) -> np.ndarray:
    """Return an output with one row for each prediction, so that batches of different lengths can be joined."""
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(1, -1)


__all__ = ["QuantizationReport", "quantization_report"]
