"""The cost model: files for any counts, times composed from layers, by clocks that follow a law."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import analyse
from dwindle.measure import get_runtime
from dwindle.search import Problem, latency_predictor
from dwindle.search.latency_prediction.kernel_times import kernel_timer
from dwindle.search.latency_prediction.preparing import template_of
from dwindle.search.latency_prediction.segments import segments_of
from dwindle.search.space import Space
from search.latency_models import LawfulLayers, LawfulModels, by_macs, images, in_blocks, net


class Setting:
    """The net, its axes and its templates, made once."""

    def __init__(self) -> None:
        self.model, self.inputs = net(), images()
        self.analysis = analyse(self.model, (self.inputs,))
        self.space = Space.of(self.analysis)
        self.templates = {}

    def template(self, precision: str):
        if precision not in self.templates:
            made = None
            if precision == "int8":
                made = lambda model: dw.quantize(model, [self.inputs])
            self.templates[precision] = template_of(
                self.model, self.inputs, analysis=self.analysis, space=self.space, quantized=made
            )
        return self.templates[precision]

    def predictor(self, folder: Path, law=by_macs, precision: str = "float32", **options):
        layers = options.pop("layers", None) or LawfulLayers(law)
        return latency_predictor(
            self.model,
            self.inputs,
            precision=precision,
            analysis=self.analysis,
            space=self.space,
            cache=folder,
            template=self.template(precision),
            kernel_timer_of=layers,
            model_timer=LawfulModels(law),
            **options,
        )

    def random_counts(self, seed: int):
        generator = np.random.default_rng(seed)
        return self.space.counts({v.name: generator.uniform(0, 0.8) for v in self.space.variables})

    def cut(self, counts):
        """The model really cut."""
        problem = Problem(self.model, self.inputs, lambda small: 0.0, {"macs": 0.5})
        axes = {own.name: own.axis for own in problem.space.variables}
        named = self.space.named(counts)
        return problem.build({axes[name]: count for name, count in named.items()}).model


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def _shapes(model) -> list[tuple]:
    """Operators with the shapes of their constants."""
    dims = {entry.name: tuple(entry.dims) for entry in model.graph.initializer}
    return [(node.op_type, [dims.get(name) for name in node.input]) for node in model.graph.node]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_template_gives_the_file_that_an_export_of_the_cut_model_gives(
    setting, tmp_path, precision
) -> None:
    template, _ = setting.template(precision)
    counts = setting.random_counts(7)
    small = setting.cut(counts)
    if precision == "int8":
        small = dw.quantize(small, [setting.inputs])
    dw.export(small, tmp_path / "small.onnx", setting.inputs, verify=False)
    made = template.model(counts)
    onnx.checker.check_model(made)
    assert _shapes(made) == _shapes(onnx.load(str(tmp_path / "small.onnx")))


def test_a_template_runs_at_full_size_as_the_model(setting) -> None:
    import onnxruntime

    template, whole = setting.template("float32")
    session = onnxruntime.InferenceSession(template.model({}).SerializeToString())
    (found,) = session.run(None, {name: setting.inputs.numpy() for name in template.inputs})
    with torch.no_grad():
        expected = setting.model(setting.inputs).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert whole.graph.node[0].op_type == template.nodes[0].name


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_segments_can_be_run_and_hold_every_operator_once(setting, precision) -> None:
    import onnxruntime

    template, _ = setting.template(precision)
    segments = segments_of(template)
    weighted = ["first", "inner", "outer", "side", "both", "hidden", "last"]
    assert [own.layer for own in segments if own.kind != "rest"] == weighted
    held = [name for own in segments for node in own.nodes for name in node.outputs]
    own = [name for node in template.nodes for name in node.outputs if node.name != "DequantizeLinear"]
    assert sorted(name for name in held if name in own) == sorted(own)
    counts = setting.random_counts(3)
    for segment in segments:
        values = tuple(int(value) for value in segment.values(counts))
        session = onnxruntime.InferenceSession(segment.model(values).SerializeToString())
        assert session.run(None, segment.feed(values))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_predictions_follow_a_law(setting, tmp_path, precision) -> None:
    predictor = setting.predictor(tmp_path, by_macs, precision)
    assert predictor.error.median < 0.02
    template, whole = setting.template(precision)
    full = LawfulModels(by_macs)([whole], [{}])[0]
    for seed in range(10):
        counts = setting.random_counts(100 + seed)
        true = LawfulModels(by_macs)([template.model(counts)], [{}])[0]
        assert predictor.seconds(counts) == pytest.approx(true, rel=0.06)
        assert predictor.share(counts) == pytest.approx(true / full, rel=0.06)


def test_layers_add_up_and_are_named_by_their_modules(setting, tmp_path) -> None:
    predictor = setting.predictor(tmp_path)
    rows = predictor.table()
    assert {row["layer"] for row in rows} >= {"first", "inner", "outer", "side", "both", "hidden", "last"}
    total = sum(row["seconds"] for row in rows) + predictor.calibration.start
    assert total == pytest.approx(predictor.seconds(setting.space.full()), rel=1e-6)
    layers = predictor.layers(setting.space.full())
    learned = predictor.calibration
    predictor.calibration = replace(learned, trust=0.5, line=(1e-4, 2e-12))
    half = sum(row["seconds"] for row in predictor.table()) + predictor.calibration.start
    assert half == pytest.approx(predictor.seconds(setting.space.full()), rel=1e-6)
    assert half != pytest.approx(total, rel=1e-3)
    assert layers["inner"] == pytest.approx(1.3 * by_macs(32, 48, 64 * 9), rel=0.05)


def test_widths_that_the_hardware_likes(setting, tmp_path) -> None:
    predictor = setting.predictor(tmp_path, in_blocks)
    space = setting.space
    assert predictor.widths("inner.weight[0]") == [16, 32]
    assert predictor.widths(space.by_name["hidden.weight[0]"]) == [16, 32, 48, 64]
    wanted = space.from_names({"inner.weight[0]": 13, "hidden.weight[0]": 33})
    even = space.from_names({"inner.weight[0]": 12, "hidden.weight[0]": 36})
    named = space.named(predictor.settled(even))
    assert named["inner.weight[0]"] == 16
    assert named["hidden.weight[0]"] == 48
    assert space.named(predictor.settled(wanted))["inner.weight[0]"] == 32  # 13 are twice as slow as 16
    names = {own.name for own in predictor.slower(wanted)}
    assert names == {"inner.weight[0]", "hidden.weight[0]"}
    slow = next(own for own in predictor.slower(wanted) if own.name == "inner.weight[0]")
    assert slow.better_seconds < slow.seconds
    assert slow.count == 13 < slow.better
    assert not predictor.slower(space.full())
    with pytest.raises(ConfigError, match=r"did you mean .inner\.weight"):
        predictor.widths("inner.weigth[0]")


def test_layer_times_are_kept(setting, tmp_path) -> None:
    layers = LawfulLayers(by_macs)
    first = setting.predictor(tmp_path, layers=layers)
    expected = first.seconds(setting.random_counts(1))
    done = layers.calls
    assert done == first.prices.measured > 0
    again = setting.predictor(tmp_path, layers=layers)
    assert again.seconds(setting.random_counts(1)) == expected
    assert layers.calls == done
    other = LawfulLayers(by_macs)
    other.identity = {**other.identity, "version": "2"}
    assert setting.predictor(tmp_path, layers=other).prices.path != first.prices.path
    assert other.calls > 0
    path = first.prices.path
    path.write_bytes(path.read_bytes()[:-9])  # a process was killed while it wrote
    before = layers.calls
    setting.predictor(tmp_path, layers=layers).seconds(setting.random_counts(1))
    assert layers.calls == before + 1


def test_a_predictor_goes_with_a_model_that_is_cut(setting, tmp_path) -> None:
    predictor = setting.predictor(tmp_path)
    counts = setting.random_counts(5)
    small = setting.cut(counts)
    analysis = analyse(small, (setting.inputs,))
    space = Space.of(analysis, floors={own.name: own.least for own in setting.space.variables})
    bound = predictor.bound_to(analysis, space)
    assert bound.seconds(space.full()) == pytest.approx(predictor.seconds(counts))
    fewer = {**counts, setting.space.by_name["hidden.weight[0]"].axis: 7}
    own = {**space.full(), space.by_name["hidden.weight[0]"].axis: 7}
    assert bound.seconds(own) == pytest.approx(predictor.seconds(fewer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "did you mean 'int8'"),
        ({"runtime": "torch"}, "not in 'torch'"),
        ({"runtime": "onnxruntimes"}, "did you mean 'onnxruntime'"),
        ({"measurements": 2}, "measurements"),
        ({"space": object()}, "analysis"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        latency_predictor(net(), images(), **options)


def test_real_layers_are_timed_in_a_runtime(setting) -> None:
    """By the real clock of ONNX Runtime: what has a thousand times the work is slower, and its border is told apart."""
    timer = kernel_timer(get_runtime("onnxruntime", threads=1))
    template, _ = setting.template("float32")
    segments = {own.layer: own for own in segments_of(template)}
    inner, last = segments["inner"], segments["last"]
    wide, narrow = (
        timer(own.model(values), own.feed(values)) for own, values in ((inner, (48, 32)), (last, (64,)))
    )
    assert 0 < narrow.inside < wide.inside < 0.1
    assert wide.enter >= 0
