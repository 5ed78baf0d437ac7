"""Files without zeros: the same tensors come back, and the files are as small as they can be said to be."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import FileFormatError
from dwindle.export.manifest import STATE
from dwindle.export.sparse_tensors import PLACES, VALUES, pack, unpack

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64]


def sparse(shape: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=generator).to(dtype)
    return values * (torch.rand(shape, generator=generator) >= share).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_what_was_packed_comes_back(
    share: float, rows: int, columns: int, kind: torch.dtype, seed: int
) -> None:
    tensor = sparse((rows, columns), share, kind, seed)
    stored, described = pack({"a.weight": tensor, "other": torch.ones(3)})
    back = unpack(stored, described, "file")
    assert set(back) == {"a.weight", "other"}
    assert back["a.weight"].dtype == kind
    assert torch.equal(back["a.weight"], tensor)
    held = sum(value.numel() * value.element_size() for name, value in stored.items() if name != "other")
    assert held <= tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.54), (0.9, 0.125), (0.99, 0.022)])
def test_sizes(share: float, most: float) -> None:
    tensor = sparse((500, 400), share)
    stored, _ = pack({"w": tensor})
    values, places = stored["w" + VALUES], stored["w" + PLACES]
    assert values.numel() == int((tensor != 0).sum())
    assert values.numel() * 4 + places.numel() <= most * tensor.numel() * 4
    blocks = torch.ones(10, 10)
    blocks.view(-1)[::2] = 0
    stored, _ = pack({"w": blocks.repeat_interleave(50, 0).repeat_interleave(40, 1)})
    assert stored["w" + PLACES].numel() < 1000  # bits of whole blocks deflate away: 25,000 bytes plain


def test_what_is_not_worth_it_stays() -> None:
    tensors = {
        "full": torch.ones(2000),
        "few": torch.zeros(100),
        "flags": torch.zeros(5000, dtype=torch.bool),
    }
    stored, described = pack(tensors)
    assert described == {}
    assert all(stored[name] is tensor for name, tensor in tensors.items())


def test_not_a_number_is_no_zero() -> None:
    tensor = torch.zeros(2000)
    tensor[5], tensor[7], tensor[9] = float("nan"), float("-inf"), -0.0
    stored, described = pack({"w": tensor})
    assert torch.equal(unpack(stored, described, "file")["w"].nan_to_num(7), tensor.nan_to_num(7))


def damaged(
    stored: dict[str, Tensor], described: dict[str, Any]
) -> list[tuple[dict[str, Tensor], dict[str, Any], str]]:
    places = stored["w" + PLACES]
    without = {"w" + VALUES: stored["w" + VALUES]}
    bomb = torch.from_numpy(np.frombuffer(zlib.compress(bytes(10**7)), dtype=np.uint8).copy())
    return [
        (without, described, "lacks"),
        ({**stored, "w" + PLACES: places[:-5]}, described, "another number"),
        ({**stored, "w" + PLACES: places.flip(0)}, described, "cannot be inflated"),
        ({**stored, "w" + PLACES: bomb}, described, "another number"),
        ({**stored, "w" + VALUES: stored["w" + VALUES][1:]}, described, "values for"),
        (stored, {"w": {"shape": [7]}}, "another number"),
    ]


def test_parts_that_do_not_belong_together() -> None:
    stored, described = pack({"w": sparse((100, 50), 0.7)})
    for parts, entry, message in damaged(stored, described):
        with pytest.raises(FileFormatError, match=message):
            unpack(parts, entry, "file")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(200, 300), nn.Linear(300, 200)
        self.tied = nn.Linear(200, 300)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.first(x)))


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 200)
    dense = dw.save(model, tmp_path / "dense")
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.mul_(torch.rand(layer.weight.shape) >= 0.9)
    packed, plain = (
        dw.save(model, tmp_path / "packed"),
        dw.save(model, tmp_path / "plain", without_zeros=False),
    )
    sizes = {place.name: (place / STATE).stat().st_size for place in (dense, packed, plain)}
    assert sizes["plain"] == sizes["dense"]
    assert sizes["packed"] < 0.16 * sizes["dense"]
    for place in (packed, plain):
        loaded = dw.load(place, model=Net)
        assert torch.equal(loaded(x), model(x))
        assert loaded.tied.weight is loaded.first.weight
    assert '"format_version": 2' in (packed / "manifest.json").read_text()
    assert '"format_version": 1' in (plain / "manifest.json").read_text()
