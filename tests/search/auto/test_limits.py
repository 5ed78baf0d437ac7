"""Budgets in words and shares."""

from __future__ import annotations

import pytest

import dwindle as dw
from dwindle.search.auto.limits import Limit, parse_limits, runtime_of


@pytest.mark.parametrize(
    ("cost", "given", "value"),
    [
        ("latency:onnxruntime", "8 ms", 8.0),
        ("latency:onnxruntime", "250us", 0.25),
        ("latency:torch", "1.5 s", 1500.0),
        ("bytes", "500 kB", 500e3),
        ("bytes", "2 MiB", 2 * 2.0**20),
        ("peak_memory", "4 MB", 4e6),
        ("macs", "40 MMACs", 40e6),
        ("macs", "40 M", 40e6),
        ("params", "1e6", 1e6),
        ("bit_operations", "3 G", 3e9),
        ("energy", "2e6 pJ", 2e6),
    ],
)
def test_words(cost: str, given: str, value: float) -> None:
    (limit,) = parse_limits({cost: given})
    assert limit == Limit(cost, pytest.approx(value), True)
    assert limit.allowed(1e12) == pytest.approx(value)


def test_shares_are_of_the_original() -> None:
    first, second = parse_limits({"latency:onnxruntime": 0.25, "bytes": 0.5})
    assert first.allowed(8.0) == 2.0
    assert second.allowed(100.0) == 50.0
    assert runtime_of("latency:openvino:bf16") == "openvino:bf16"
    assert runtime_of("bytes") is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "at least one limit"),
        ({"latensy:onnxruntime": 0.5}, "did you mean 'latency'"),
        ({"latency": 0.5}, "name the runtime"),
        ({"latency:onxruntime": 0.5}, "did you mean 'onnxruntime'"),
        ({"bytes:onnxruntime": 0.5}, "is not one of"),
        ({"macs": 1.5}, "not a share"),
        ({"macs": 0}, "not a share"),
        ({"bytes": "5 ms"}, "no number with a unit"),
        ({"latency:torch": "5"}, "no number with a unit"),
        ({"bytes": "0 kB"}, "not above 0"),
    ],
)
def test_bad_budgets_are_named(budget: dict[str, float | str], message: str) -> None:
    with pytest.raises(dw.ConfigError, match=message):
        parse_limits(budget)
