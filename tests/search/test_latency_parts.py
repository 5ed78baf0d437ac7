"""Parts of the cost model by themselves: widths between measured ones, sizes, fits, profiles."""

from __future__ import annotations

import math
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from dwindle.config.errors import ConfigError
from dwindle.graph.axes import concatenation, leaf, product
from dwindle.search.latency_prediction import machine
from dwindle.search.latency_prediction.calibration import calibrated
from dwindle.search.latency_prediction.kernel_times import (
    KernelTime,
    _mean_of_quiet,
    _of_counters,
    _runs_of,
    _typical,
)
from dwindle.search.latency_prediction.sizes import SizeMatcher
from dwindle.search.latency_prediction.widths import interpolated, knots, neighbours


def _at(values, sizes, law) -> float:
    return float(interpolated(values, sizes, lambda own: np.array([float(law(*own))]))[0])


def test_a_staircase_is_predicted_exactly() -> None:
    law = lambda width: math.ceil(width / 16)
    for width in range(1, 129):
        if width % 16 in (0, *range(4, 16, 4)):
            assert _at((width,), (128,), law) == law(width), width


def test_a_line_is_predicted_exactly_at_every_width() -> None:
    for size in (7, 12, 64, 100, 1536):
        for width in range(1, size + 1):
            assert _at((width,), (size,), lambda own: 3 + 2 * own) == pytest.approx(
                3 + 2 * width, abs=8 + size / 10
            )
            low, high, share = neighbours(width, size)
            assert 1 <= low <= high <= size
            assert 0 <= share <= 1
            if low <= width <= high:
                assert _at((width,), (size,), lambda own: 3 + 2 * own) == pytest.approx(3 + 2 * width)


def test_other_kernels_for_odd_widths_do_not_blur_the_even_ones() -> None:
    law = lambda width: width * (5 if width % 4 else 1)
    for width in range(33, 64):
        assert _at((width,), (64,), law) == pytest.approx(law(width))


def test_two_dimensions_are_exact_for_products_and_close_to_planes() -> None:
    plane = lambda a, b: 1 + 2 * a + 3 * b
    for a, b in ((37, 61), (40, 44), (64, 5), (17, 100)):
        assert _at((a, b), (64, 128), lambda x, y: x * y) == pytest.approx(a * b)
        assert _at((a, b), (64, 128), plane) == pytest.approx(plane(a, b), rel=0.02)
    assert _at((40, 44), (64, 128), lambda x, y: 0.0) == 0.0


def test_few_widths_are_measured() -> None:
    assert knots(12) == list(range(1, 13))
    assert len(knots(1536)) < 90
    assert knots(64)[-1] == 64


def test_sizes_are_matched_to_axes() -> None:
    heads, width, tail = leaf(12), leaf(32), leaf(10)
    both, joined = product([heads, width]), concatenation([width, tail])
    exports = [{}, {heads: 7, tail: 4}]
    matcher = SizeMatcher([heads, width, tail, both, joined], exports, [{heads: 5, tail: 9}])
    assert not matcher.ambiguous
    assert matcher.size((384, 224), "a").at({heads: 3}) == 96
    assert matcher.size((42, 36), "a").at({tail: 1}) == 33
    assert matcher.size((24, 14), "a").at({heads: 3}) == 6  # two for each head
    assert matcher.size((9, 9), "a").at({heads: 3}) == 9
    with pytest.raises(ConfigError, match="no axis explains"):
        matcher.size((12, 5), "dimension 0 of w")
    twins = SizeMatcher([leaf(8), leaf(8)], [{}], [])
    assert not twins.by_values
    one, other = leaf(8), leaf(8)
    assert SizeMatcher([one, other], [{}, {one: 3, other: 3}], [{one: 4, other: 5}]).ambiguous


def test_a_calibration_finds_scales_and_reports_held_out_errors() -> None:
    generator = np.random.default_rng(0)
    composed = generator.random((12, 3)) * [5, 1, 2] + 0.1
    true = composed @ [1.1, 1.0, 1.3] + 0.2
    found = calibrated(composed, true)
    predicted = [found.seconds(row) for row in composed]
    assert np.abs(predicted / true - 1).max() < 0.02
    assert found.error.median < 0.02
    assert found.error.models == 12
    assert all(scale >= 0 for scale in found.scales)
    noisy = true * np.exp(generator.normal(0, 0.1, 12))
    assert calibrated(composed, noisy).error.median > 0.02
    with pytest.raises(ConfigError, match="three"):
        calibrated(composed[:2], true[:2])


@pytest.mark.parametrize(("layers", "work", "trust"), [(0.0, 0.2, 1.0), (0.1, 0.0, 0.5), (0.1, 0.1, 0.5)])
def test_layers_are_trusted_as_far_as_held_out_models_say(layers: float, work: float, trust: float) -> None:
    """Noise on the layers' times, on the multiply-accumulates, or on both: independent, so that the mean is best."""
    generator = np.random.default_rng(1)
    true = generator.random(40) * 5 + 0.5
    composed = (true * np.exp(generator.normal(0, layers, 40)))[:, None]
    macs = 1e9 * true * np.exp(generator.normal(0, work, 40))
    found = calibrated(composed, true, macs)
    assert found.trust == trust
    errors = [
        abs(found.seconds(row, count) / own - 1) for row, count, own in zip(composed, macs, true, strict=True)
    ]
    assert np.median(errors) < 0.08
    alone = calibrated(composed, true)
    assert alone.trust == 1.0
    assert found.error.median <= alone.error.median + 1e-9


def test_a_profile_of_onnxruntime_is_read() -> None:
    def event(name: str, operator: str, start: int, length: int) -> dict:
        return {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "args": {"op_name": operator},
            "ts": start,
            "dur": length,
        }

    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 100},
        event("a", "ReorderInput", 1, 10),
        event("conv", "Conv", 12, 50),
        event("border_q", "QuantizeLinear", 63, 20),
        event("b", "ReorderOutput", 84, 5),
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 100},
        event("conv", "Conv", 210, 40),
    ]
    first, second = _runs_of(events)
    assert (first.inside, first.enter, first.leave) == pytest.approx((50e-6, 10e-6, 5e-6))
    assert second.inside == pytest.approx(40e-6)


def test_counters_of_openvino_are_averages_over_all_runs() -> None:
    def counter(name: str, kind: str, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(node_name=name, node_type=kind, real_time=timedelta(microseconds=microseconds))

    own = _of_counters(
        [
            counter("x_abcd_acdb_conv", "Reorder", 3),
            counter("border_q", "FakeQuantize", 9),
            counter("conv", "Convolution", 50),
            counter("conv_acdb_abcd_y", "Reorder", 4),
        ],
        {"x", "y"},
    )
    assert (own.inside, own.enter, own.leave) == pytest.approx((50e-6, 3e-6, 4e-6))
    times = [900.0, 60.0, 50.0, 50.0, 5000.0, 50.0, 50.0]  # one run warms up, one was disturbed
    averages = [KernelTime(sum(times[: n + 1]) / (n + 1)) for n in range(len(times))]
    lost = [0.0, 0.0, 0.0, 0.9, 0.0, 0.0]
    assert _mean_of_quiet(averages, lost).inside == pytest.approx(50.0)


def test_disturbed_runs_do_not_count() -> None:
    times = [KernelTime(9.0), KernelTime(1.0), KernelTime(7.0), KernelTime(1.2), KernelTime(1.1)]
    assert _typical(times, [0.0, 0.8, 0.0, 0.01]).inside == 1.1
    assert _typical(times, [0.5, 0.8, 0.6, 0.7]).inside > 0


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path))
    assert machine.cache_folder() == tmp_path
    monkeypatch.delenv("DWINDLE_CACHE")
    assert machine.cache_folder().name == "dwindle"
    assert machine.fingerprint() == machine.fingerprint()
    assert machine.version_of("no-such-library") == "unknown"
