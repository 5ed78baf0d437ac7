"""``dw.export``: writes a model for a runtime, runs what was written, and compares."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, ExportError, did_you_mean
from dwindle.export.atomic import publish
from dwindle.export.capture import capture_program, quiet, structure_of
from dwindle.export.comparison import Difference, difference
from dwindle.export.onnx_file import OPSET, external_files
from dwindle.export.openvino_file import write_openvino
from dwindle.export.program_file import read_program, write_program
from dwindle.export.writing import WrittenModel, is_quantized, write_onnx_of
from dwindle.graph.modes import in_mode
from dwindle.measure.runtime import refuse_bfloat16
from dwindle.measure.runtimes import OnnxRuntime, OpenVinoRuntime
from dwindle.measure.structure import (
    InputStructure,
    batch_size,
    batched_inputs,
    example_call,
    flatten,
    with_batch,
)
from dwindle.quantization.aware_training import finished
from dwindle.simulate import refuse_shards

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}
FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 0.1
"""Of the root mean square: 20 dB. In deep networks one rounding that falls to the other side makes others do so: even
the simulation in float64 agrees with that in float32 to about 30 dB there."""
WEIGHTS_ONLY_TOLERANCE = 10**-1.5
"""Likewise: 30 dB. Where only weights are integers, nothing falls to another side."""
GOOD_PARITY_DB = 30.0
"""Below this parity a note says so."""


@dataclass
class ExportResult:
    """What was written, and how far it is from torch.

    Attributes:
        path: The model file.
        files: All files, the model first.
        bytes: Their size together.
        format: ``onnx``, ``openvino`` or ``torch``.
        checked_in: The runtime in which the file was run and compared; None when that was switched off.
        max_difference: Largest absolute difference to torch's outputs (the simulation's, for int8).
        relative_difference: The same, divided by the largest magnitude of that output.
        parity_db: Signal to noise between the simulation's outputs and the file's, of int8 models; None where they are
            equal or the file was not run.
        checked_batches: The batch sizes it was compared at.
        dynamic_batch: Whether the file takes any batch size.
        quantized: Whether it is an int8 model.
        weights_only: Whether only its weights are integers.
        notes: What the user should know.
        seconds: How long it took.
    """

    path: Path
    files: list[Path]
    bytes: int
    format: str
    checked_in: str | None = None
    max_difference: float | None = None
    relative_difference: float | None = None
    parity_db: float | None = None
    checked_batches: list[int] = field(default_factory=list)
    dynamic_batch: bool = False
    quantized: bool = False
    weights_only: bool = False
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "path": str(self.path), "files": [str(file) for file in self.files]}

    def summary(self) -> str:
        """Return one line for people."""
        checked = (
            f"{self.checked_in} differs from torch by at most {self.max_difference:.2g}"
            if self.checked_in is not None
            else "not run"
        )
        if self.parity_db is not None:
            checked += f" (parity {self.parity_db:.1f} dB)"
        batch = "any batch size" if self.dynamic_batch else "fixed batch size"
        return f"{self.path}: {self.bytes / 1e6:.2f} MB, {batch}, {checked}"


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool | None = None,
    opset: int = OPSET,
    external_data: bool | None = None,
    half_weights: bool = False,
    exact_products: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
) -> ExportResult:
    """Write a model as ``.onnx``, OpenVINO ``.xml`` or ``torch.export`` ``.pt2``; the file is then run and
    compared.

    The model is exported in evaluation mode and left as it was. Models that :func:`dwindle.quantize` made
    are written as int8 (QDQ), and so are those that are trained with quantizers (what ``finish()`` gives).
    Positional, keyword and dict inputs are welcome, and so are dict and dataclass outputs; flat input and
    output names are those of the model's own arguments and keys. A file that computes something else than
    torch does is not left behind: the target is replaced only after the comparison. The order of the files'
    replacement makes sure that a model file never stands beside foreign weights.

    Args:
        model: The model.
        path: Where to write; the suffix decides the format.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs. Batch in
            dimension 0; a batch of 1 is doubled for the capture, since a capture at batch 1 is good for no
            other size.
        example_kwargs: Keyword inputs.
        dynamic_batch: True: any batch size, or an error. False: the example's batch only. None: dynamic if
            the model allows it, with a note otherwise.
        opset: ONNX operator set.
        external_data: ONNX weights in a file of their own; None: only when they are too big for one file.
        half_weights: OpenVINO weights stored as float16.
        exact_products: For packed weights in ONNX Runtime: multiply with float inputs, which is no faster than a float
            model. Otherwise the inputs of these products are rounded to int8 in blocks.
        verify: Run the written file and compare.
        tolerance: Largest allowed difference, as a fraction of the largest magnitude of the output.
            Default: 1e-3. For int8, where single roundings may fall to the other side, the root mean square of
            the difference as a fraction of that of the output; default: 0.1, a parity of 20 dB. Below 30 dB
            there is a note.

    Raises:
        ConfigError: Unknown suffix, or inputs that do not fit.
        ExportError: The model cannot be written in this format, or the file computes something else.
        MissingDependencyError: A library is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"cannot tell the format of {path.name!r}{did_you_mean(path.suffix, FORMATS)}; "
            f"the suffix must be one of {', '.join(FORMATS)}"
        )
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a directory; give the name of a file in it")
    begin = time.perf_counter()
    model = finished(model)
    refuse_shards(model, "dw.export")
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    structure = structure_of(model, args, kwargs)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"dynamic_batch": dynamic_batch, "opset": opset, "external_data": external_data}
    options["exact_products"] = exact_products
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as directory:
        draft = Path(directory) / path.name
        written, runner = _write(model, structure, draft, options, half_weights, verify)
        result = ExportResult(path, [], 0, FORMATS[path.suffix], notes=written.notes)
        result.dynamic_batch, result.quantized = written.dynamic_batch, written.quantized
        result.weights_only = written.weights_only
        if verify:
            _compare(model, structure, runner, result, tolerance)
        result.files = _publish(written.files, path)
    result.bytes = sum(file.stat().st_size for file in result.files)
    result.seconds = time.perf_counter() - begin
    return result


def _write(
    model: nn.Module,
    structure: InputStructure,
    draft: Path,
    options: dict[str, Any],
    half_weights: bool,
    verify: bool,
) -> tuple[WrittenModel, Any]:
    """Write the draft; return what was written and (when it is to be verified) something that runs it."""
    if draft.suffix == ".pt2":
        return _write_program(model, structure, draft, options["dynamic_batch"])
    runtime = OnnxRuntime() if draft.suffix == ".onnx" else OpenVinoRuntime()
    if verify or draft.suffix == ".xml":
        runtime.check()
    if verify:
        refuse_bfloat16(model, structure)
    written = write_onnx_of(model, structure, draft.with_suffix(".onnx"), **options)
    if draft.suffix == ".xml":
        written.files = write_openvino(written.files[0], draft, half_weights=half_weights)
    if not verify:
        return written, None
    handle = runtime.load(draft)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = runtime.feed(handle, dict(zip(structure.names, tensors, strict=True)))
        return runtime.tensors(runtime.run(handle, feed))

    return written, run


def _write_program(
    model: nn.Module, structure: InputStructure, draft: Path, dynamic_batch: bool | None
) -> tuple[WrittenModel, Any]:
    """Write a ``.pt2``, which keeps the model's own call signature."""
    if is_quantized(model):
        raise ExportError("an int8 simulation has no .pt2 form; export it as .onnx or .xml")
    program, is_dynamic, notes = capture_program(model, structure, dynamic_batch)
    files = write_program(program, draft)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = structure.unflatten(tensors)
        with torch.no_grad():
            return [tensor for _, tensor in flatten(read_program(draft).module()(*args, **kwargs))[0]]

    return WrittenModel(files, is_dynamic, notes=notes), run


def _compare(
    model: nn.Module, structure: InputStructure, run: Any, result: ExportResult, tolerance: float | None
) -> None:
    """Run the file at one or two batch sizes, and raise when it is not what torch computes."""
    size = batch_size(structure.example)
    batches = [size]
    if result.dynamic_batch and any(batched_inputs(structure.example)):
        batches.append(3 if size != 3 else 2)
    maximum = relative = noise = 0.0
    for batch in batches:
        tensors = structure.example if batch == size else with_batch(structure.example, batch or 1)
        args, kwargs = structure.unflatten(tensors)
        with in_mode(model, training=False), torch.no_grad():
            expected = [tensor for _, tensor in flatten(model(*args, **kwargs))[0]]
        with quiet():
            gap = difference(expected, run(tensors))
        _judge(gap, batch, result, tolerance)
        maximum, relative = max(maximum, gap.maximum), max(relative, gap.relative)
        noise = max(noise, gap.root_mean_square)
    result.checked_in = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch.export"}[
        result.format
    ]
    result.checked_batches = [batch for batch in batches if batch is not None]
    result.max_difference, result.relative_difference = maximum, relative
    if result.quantized and noise > 0:
        result.parity_db = -20 * math.log10(noise)
        if result.parity_db < GOOD_PARITY_DB:
            result.notes.append(
                f"the file agrees with its simulation to {result.parity_db:.1f} dB only: measure the file's own quality"
            )


def _judge(gap: Difference, batch: int | None, result: ExportResult, tolerance: float | None) -> None:
    measured = gap.root_mean_square if result.quantized else gap.relative
    usual = QUANTIZED_TOLERANCE if result.quantized else FLOAT_TOLERANCE
    allowed = tolerance or (WEIGHTS_ONLY_TOLERANCE if result.weights_only else usual)
    at = f"at batch {batch}" if batch is not None else ""
    if gap.problem is not None:
        raise ExportError(f"the exported {result.format} file computes something else {at}: {gap.problem}")
    if not measured <= allowed or gap.mismatches > 0.01:
        way = (
            "; exact_products=True computes it exactly, tolerance= allows it"
            if result.weights_only and result.format == "onnx"
            else ""
        )
        raise ExportError(
            f"the exported {result.format} file computes something else {at}: it differs from torch by "
            f"{gap.maximum:.3g} ({measured:.3g} of the output's magnitude, allowed are {allowed:.3g}); "
            f"{gap.mismatches:.1%} of integer outputs are unequal. Nothing was written to {result.path}{way}"
        )


def _publish(files: list[Path], path: Path) -> list[Path]:
    stale = (
        [path.parent / name for name in external_files(path)]
        if path.suffix == ".onnx" and path.exists()
        else []
    )
    return publish(files, path, stale)
