"""States come back equal bit by bit, and damaged files say so."""

import random

import numpy as np
import pytest
import torch

from dwindle.config.errors import FileFormatError
from dwindle.training.checkpoint import load_state, random_state, restore_random_state, save_state


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_round_trip_of_everything(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "tensor": torch.randn(2, 3, 4, 4, dtype=torch.float64),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "tied": [shared, shared],
        "scalar": torch.tensor(3),
        "half": torch.randn(3).to(torch.bfloat16),
        "empty": torch.empty(0, 2),
        "array": np.arange(5, dtype=np.uint32),
        "integer keys": {0: {"step": torch.tensor(1.0)}, 7: None},
        "odd keys": {"$tensor": 1, "$items": (2, 3)},
        "numbers": [0.1, 1e-300, -0.0, 10**30, True, None, "text", float("inf")],
        "nested": ({"a": ((), [])},),
    }
    save_state(state, tmp_path / "state")
    assert same(load_state(tmp_path / "state"), state)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_random_generators_go_on_where_they_were(tmp_path):
    draw = lambda: (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    draw()
    save_state({"random": random_state()}, tmp_path / "state")
    expected = draw()
    draw()
    restore_random_state(load_state(tmp_path / "state")["random"])
    assert draw() == expected


def test_what_needs_pickle_is_refused_by_name_and_the_old_file_stays(tmp_path):
    save_state({"a": 1}, tmp_path / "state")
    with pytest.raises(TypeError, match=r"state\['model'\]\[1\] is a function"):
        save_state({"model": [1, lambda: 0]}, tmp_path / "state")
    assert load_state(tmp_path / "state") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        load_state(path)
    save_state({"a": torch.arange(100)}, path)
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            load_state(path)
    from safetensors.torch import save_file

    save_file({"a": torch.arange(3)}, path)
    with pytest.raises(FileFormatError, match="no training state"):
        load_state(path)
