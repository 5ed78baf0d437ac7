"""Every observer against NumPy."""

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.quantization import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    NumberFormat,
    PercentileObserver,
)
from dwindle.quantization.observers import make_observer
from dwindle.quantization.observers.growing_histogram import GrowingHistogram

UINT8 = NumberFormat.parse("uint8")
INT8 = NumberFormat.parse("int8")


def batches(count=5, size=4000, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(0.3, 1 + index, size).astype(np.float32) for index in range(count)]


def feed(observer, arrays):
    for array in arrays:
        observer.update(torch.from_numpy(array).reshape(2, -1))
    return observer


def test_minmax():
    data = batches()
    assert feed(MinMaxObserver(), data).range(UINT8) == (
        min(float(a.min()) for a in data),
        max(float(a.max()) for a in data),
    )


def test_minmax_contains_zero():
    assert feed(MinMaxObserver(), [np.array([2.0, 3.0], np.float32)]).range(UINT8) == (0.0, 3.0)
    assert feed(MinMaxObserver(), [np.array([-2.0, -3.0], np.float32)]).range(UINT8) == (-3.0, 0.0)


def test_moving_average():
    data = batches()
    low, high = float(data[0].min()), float(data[0].max())
    for array in data[1:]:
        low, high = 0.75 * low + 0.25 * float(array.min()), 0.75 * high + 0.25 * float(array.max())
    got = feed(MovingAverageObserver(0.25), data).range(UINT8)
    np.testing.assert_allclose(got, (low, high), rtol=1e-6)


@pytest.mark.parametrize("percentile", [96.0, 99.0])
def test_percentile(percentile):
    data = batches(size=40_000)
    share = (100 - percentile) / 2
    expected = np.percentile(np.concatenate(data), [share, 100 - share])
    observer = feed(PercentileObserver(percentile), data)
    bin_width = 2 * observer.histogram.reach / observer.histogram.bins
    np.testing.assert_allclose(observer.range(UINT8), expected, atol=3 * bin_width)


def test_whole_percentile_is_minmax():
    data = batches()
    got = feed(PercentileObserver(100.0), data).range(UINT8)
    np.testing.assert_allclose(got, feed(MinMaxObserver(), data).range(UINT8))


def test_growing_histogram_counts_as_numpy_does():
    histogram = GrowingHistogram(64)
    data = [a / 7 for a in batches()]
    for array in data:
        histogram.add(torch.from_numpy(array))
    counts, _ = np.histogram(np.concatenate(data), bins=histogram.edges())
    assert histogram.counts.sum() == sum(a.size for a in data)
    assert np.abs(histogram.counts - counts).sum() <= 4  # values on a border


def test_growing_histogram_leaves_out_what_is_not_finite():
    histogram = GrowingHistogram(8)
    histogram.add(torch.tensor([1.0, float("inf"), float("nan"), -2.0]))
    assert histogram.counts.sum() == 2
    assert (histogram.low, histogram.high) == (-2.0, 1.0)


@pytest.mark.parametrize("form", [UINT8, INT8, NumberFormat.parse("uint4")])
def test_histogram_finds_the_least_error(form):
    generator = np.random.default_rng(1)
    values = np.concatenate([generator.normal(0, 1, 50_000), [30.0, -18.0]]).astype(np.float32)
    observer = HistogramObserver()
    observer.update(torch.from_numpy(values))
    got = observer.range(form)

    def error(low, high):
        if form.symmetric:
            scale, zero = max(-low, high) / form.highest, 0
        else:
            scale = (high - low) / (form.highest - form.lowest)
            zero = np.round(form.lowest - low / scale)
        levels = np.clip(np.round(values / scale) + zero, form.lowest, form.highest)
        return np.mean(((levels - zero) * scale - values.astype(np.float64)) ** 2)

    best = min(error(-low, high) for low in np.linspace(0.5, 18, 60) for high in np.linspace(0.5, 30, 60))
    assert error(*got) <= best * 1.05
    assert error(*got) < error(float(values.min()), float(values.max()))


def test_histogram_without_outliers_keeps_nearly_everything():
    values = np.linspace(0, 6, 10_000, dtype=np.float32)
    low, high = feed(HistogramObserver(), [values]).range(UINT8)
    assert low == 0.0
    assert 5.8 < high <= 6.0


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "histogram"])
def test_nothing_observed(name):
    with pytest.raises(ValueError, match="nothing was observed"):
        make_observer(name).range(UINT8)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "histogram"])
def test_only_zeros(name):
    assert feed(make_observer(name), [np.zeros(10, np.float32)]).range(UINT8) == (0.0, 0.0)


def test_unknown_observer():
    with pytest.raises(ConfigError, match="did you mean 'minmax'"):
        make_observer("min_max")
