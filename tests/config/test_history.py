"""The history of a model, and the errors."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from dwindle.config.errors import (
    ConfigError,
    DwindleError,
    MissingDependencyError,
    did_you_mean,
    nearest,
    require,
)
from dwindle.config.history import history, record


def test_history_travels_with_copies_and_not_with_the_state():
    model = nn.Linear(2, 2)
    keys = list(model.state_dict())
    assert history(model) == []
    record(model, {"kind": "shrink", "plan": {"axes": [1, 2]}})
    twin = copy.deepcopy(model)
    record(model, {"kind": "quantize"})
    assert [entry["kind"] for entry in history(model)] == ["shrink", "quantize"]
    assert history(twin) == [{"kind": "shrink", "plan": {"axes": [1, 2]}}]
    assert list(model.state_dict()) == keys


def test_history_is_not_shared_with_the_caller():
    model, plan = nn.Linear(2, 2), {"axes": [1]}
    record(model, {"kind": "shrink", "plan": plan})
    plan["axes"].append(2)
    history(model)[0]["plan"]["axes"].append(3)
    assert history(model) == [{"kind": "shrink", "plan": {"axes": [1]}}]


@pytest.mark.parametrize("entry", [{}, {"kind": 3}, {"kind": "shrink", "model": nn.ReLU()}])
def test_what_is_no_history(entry):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError):
        record(model, entry)
    assert history(model) == []


def test_nearest_choice():
    assert nearest("Conv2D", ["Linear", "Conv2d"]) == "Conv2d"
    assert nearest("zzz", ["Linear", "Conv2d"]) is None
    assert did_you_mean("linaer", ["Linear"]) == "; did you mean 'Linear'?"
    assert did_you_mean("zzz", ["Linear"]) == ""


def test_errors_are_of_one_family_and_of_their_python_kind():
    assert issubclass(ConfigError, DwindleError)
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(MissingDependencyError, match=r'pip install "dwindle\[onnx\]"'):
        require("no_such_library", "onnx")
    with pytest.raises(ImportError):
        require("no_such_library", "onnx")
