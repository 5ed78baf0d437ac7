"""``dw.search.latency_predictor``: times the layers of a model and some whole models, and fits the one to the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean, require
from dwindle.export.writing import write_onnx_of
from dwindle.graph.analysis import Analysis, analyse
from dwindle.graph.counts import Counts
from dwindle.graph.stand_ins import copied
from dwindle.measure.runtime import Runtime
from dwindle.measure.runtimes import get_runtime
from dwindle.measure.structure import InputStructure, example_call
from dwindle.quantization.quantize import quantize
from dwindle.realize.cost import CostModel
from dwindle.realize.shrink import shrink
from dwindle.search.latency_prediction.calibration import calibrated
from dwindle.search.latency_prediction.exported import Exported
from dwindle.search.latency_prediction.kernel_times import KernelTimer, kernel_timer
from dwindle.search.latency_prediction.predictor import LatencyPredictor
from dwindle.search.latency_prediction.price_list import PriceList
from dwindle.search.latency_prediction.segments import segments_of
from dwindle.search.latency_prediction.sizes import SizeMatcher, every_axis
from dwindle.search.latency_prediction.template import Template
from dwindle.search.latency_prediction.whole_models import ModelTimer, WholeModelTimer
from dwindle.search.space import Space
from dwindle.training.progress import narrated

__all__ = ["PRECISIONS", "latency_predictor", "template_of"]

PRECISIONS = ("float32", "int8")
#: The largest share that differently cut models lose of an axis.
DEEPEST = 0.7


def latency_predictor(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    runtime: str | Runtime = "onnxruntime",
    precision: Literal["float32", "int8"] = "float32",
    analysis: Analysis | None = None,
    space: Space | None = None,
    calibration_data: Any = None,
    quantized: Callable[[nn.Module], nn.Module] | None = None,
    threads: int | None = None,
    cache: str | Path | None = None,
    measurements: int = 8,
    seed: int = 0,
    template: tuple[Template, Any] | None = None,
    kernel_timer_of: KernelTimer | None = None,
    model_timer: ModelTimer | None = None,
) -> LatencyPredictor:
    """Return what predicts the latency of a model that is cut to any counts.

    The model is exported whole and cut once, which tells every size of the file as a function of counts. Its layers are
    then timed one by one at the widths that predictions ask for, kept on the disk for this machine, and added up; some
    whole models, cut at random, tell how much to trust the sum.

    Args:
        model: The float model; it is left as it was.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs. Latency is that of one
            forward pass of these.
        example_kwargs: Keyword inputs.
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        precision: ``"float32"``, or ``"int8"``: as :func:`dwindle.quantize` makes it.
        analysis: The axes of the model, when they are known already: counts are counts of its axes.
        space: The variables that may shrink, of that analysis; None: all that shrink by default.
        calibration_data: Batches for int8; None: the example inputs (latency does not depend on values).
        quantized: Makes the int8 model of a float one; None: :func:`dwindle.quantize` for the runtime.
        threads: Threads of one pass; None: the runtime's own choice.
        cache: Folder of layer times; None: ``$DWINDLE_CACHE`` or the user's cache folder.
        measurements: Whole models that are measured, at least three.
        seed: Of the random cuts.
        template: From :func:`template_of` for this model, space and precision, where it is made already.
        kernel_timer_of: Times layers, in place of the runtime's profiler.
        model_timer: Times whole models, in place of the wall clock.

    Raises:
        ConfigError: An argument is not valid, or the model's exports cannot be compared.
        ExportError: The model has no ONNX form.
        MissingDependencyError: A library is missing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}"
        )
    if measurements < 3:
        raise ConfigError(f"measurements: {measurements} is below 3")
    if space is not None and analysis is None:
        raise ConfigError("space: give the analysis that it belongs to as well")
    chosen = get_runtime(runtime, threads=threads)
    timer = kernel_timer_of or kernel_timer(chosen)
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    analysis = analysis or analyse(model, args, kwargs)
    space = space or Space.of(analysis)
    structure = InputStructure(model, args, kwargs)
    make = quantized or _quantizing(structure, calibration_data, chosen.name)
    with narrated("cost model") as tell:
        tell("exporting the model, whole and cut")
        made, whole = template or _template(model, structure, analysis, space, precision, make, seed)
    segments = segments_of(made)
    prices = PriceList(timer, None if cache is None else Path(cache))
    predictor = LatencyPredictor(
        chosen.label,
        precision,
        space,
        segments,
        prices,
        calibrated(np.ones((3, 1)), [1.0, 1.0, 1.0]),
        CostModel.of(analysis),
        1.0,
    )
    cuts = _cuts(space, measurements, seed)
    predictor.prepare(cuts)
    models: list[Any] = [whole, *(made.model(counts) for counts in cuts)]
    feeds = [made.feed(counts) for counts in ({}, *cuts)]
    with narrated("cost model") as tell:
        tell("timing whole models")
        times = list((model_timer or WholeModelTimer(chosen))(models, feeds))
    rows = [predictor._classes(counts) for counts in cuts]
    predictor.measured = list(zip(cuts, times[1:], strict=True))
    work = [predictor.work.macs(counts) for counts in cuts]
    predictor.calibration = calibrated(np.array(rows), times[1:], work)
    predictor.float_seconds = times[0] if precision != "float32" else float(np.mean(times[:2]))
    return predictor


def template_of(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    analysis: Analysis,
    space: Space,
    quantized: Callable[[nn.Module], nn.Module] | None = None,
    seed: int = 0,
) -> tuple[Template, Any]:
    """Return the file of a model as a function of counts, and the whole float model as ONNX.

    Args:
        model: The float model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs.
        analysis: The axes of the model.
        space: The variables that may shrink.
        quantized: Makes the int8 model of a float one; None: the file is float.
        seed: Of the random cuts.
    """
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    structure = InputStructure(model, args, kwargs)
    precision = "float32" if quantized is None else "int8"
    return _template(model, structure, analysis, space, precision, quantized or _same, seed)


def _same(model: nn.Module) -> nn.Module:
    return model


def _template(
    model: nn.Module,
    structure: InputStructure,
    analysis: Analysis,
    space: Space,
    precision: str,
    quantized: Callable[[nn.Module], nn.Module],
    seed: int,
) -> tuple[Template, Any]:
    """Return the template of a model in a precision, and the whole float model as ONNX."""
    axes = every_axis(analysis)
    cuts, matcher = _telling_cuts(space, axes, seed)
    exports = []
    whole = None
    with tempfile.TemporaryDirectory(prefix="dwindle-template-", ignore_cleanup_errors=True) as folder:
        for number, counts in enumerate([space.full(), *cuts]):
            small = model if number == 0 else _cut(model, analysis, space, counts)
            if number == 0 and precision == "int8":
                whole = _onnx(_write(model, structure, Path(folder) / "whole.onnx"))
            if precision == "int8":
                small = quantized(small)
            path = _write(small, structure, Path(folder) / f"{number}.onnx")
            exports.append(Exported.read(path, structure))
            if whole is None:
                whole = _onnx(path)
    return Template.of(exports, matcher), whole


def _write(model: nn.Module, structure: InputStructure, path: Path) -> Path:
    write_onnx_of(model, structure, path)
    return path


def _onnx(path: Path) -> Any:
    return require("onnx", "onnx").load(str(path))


def _cut(model: nn.Module, analysis: Analysis, space: Space, counts: Counts) -> nn.Module:
    """Return a copy with the first indices of each axis."""
    keep = {
        variable.axis: torch.arange(variable.size) < counts[variable.axis]
        for variable in space.variables
        if counts[variable.axis] < variable.size
    }
    return shrink(
        copied(model), analysis, space.solver, keep, optimizer=None, verify=False, mask=_unmasked
    ).model


def _quantizing(structure: InputStructure, data: Any, backend: str) -> Callable[[nn.Module], nn.Module]:
    inputs = dict(structure.kwargs) if structure.kwargs else tuple(structure.args)
    return lambda model: quantize(model, [inputs] if data is None else data, backend=backend)


def _telling_cuts(space: Space, axes: Sequence[Any], seed: int) -> tuple[list[Counts], SizeMatcher]:
    """Return counts that tell all axes apart, as few as possible, and what matches sizes by them."""
    generator = np.random.default_rng(seed)
    space = Space(space.variables, space.solver)  # rounded counts would make different axes equal
    checks = [_random_cut(space, generator) for _ in range(8)]
    best: tuple[int, list[Counts], SizeMatcher] | None = None
    for several in (1, 2, 3):
        for _ in range(60):
            cuts = [_random_cut(space, generator) for _ in range(several)]
            matcher = SizeMatcher(axes, [space.full(), *cuts], checks)
            if best is None or len(matcher.ambiguous) < best[0]:
                best = len(matcher.ambiguous), cuts, matcher
            if not matcher.ambiguous:
                return cuts, matcher
    assert best is not None
    return best[1], best[2]


def _random_cut(space: Space, generator: np.random.Generator) -> Counts:
    """Counts that differ from the whole ones wherever that is possible."""
    tops = {variable.name: min(DEEPEST, variable.largest_ratio) for variable in space.variables}
    return space.counts({name: generator.uniform(min(0.05, top), top) for name, top in tops.items()})


def _cuts(space: Space, number: int, seed: int) -> list[Counts]:
    """Counts to measure: the whole model, even cuts, and random ones."""
    generator = np.random.default_rng(seed + 1)
    even = [space.counts({v.name: share * v.largest_ratio for v in space.variables}) for share in (0.4, 0.8)]
    while len(even) < number - 1:
        top = generator.uniform(0.3, 1.0)
        even.append(
            space.counts({v.name: generator.uniform(0, top) * v.largest_ratio for v in space.variables})
        )
    return [space.full(), *even]


def _unmasked(copy: nn.Module, plan: Any) -> None:
    """Nothing is proven here: only shapes matter."""
