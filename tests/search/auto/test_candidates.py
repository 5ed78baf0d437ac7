"""Candidates as plain data: there and back, as recipe stages, as models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import dwindle as dw
from dwindle.search.auto import Candidate
from dwindle.search.auto.making import built
from dwindle.search.auto.variant import Workpiece

CANDIDATE = Candidate(
    blocks=("stages.0.1",),
    counts={"stem.weight[0]": 6, "stages.1.0.conv1.weight[0]": 9},
    importance="taylor",
    float_layers=("stem",),
)


def test_there_and_back() -> None:
    again = Candidate.from_json(CANDIDATE.to_json())
    assert again == CANDIDATE
    assert again.key == CANDIDATE.key
    assert again.but(numbers="float32").key != CANDIDATE.key
    with pytest.raises(dw.ConfigError, match="did you mean 'blocks'"):
        Candidate.from_json({"block": []})


def test_the_model_has_the_counts_and_the_original_is_as_it_was(workpiece: Workpiece) -> None:
    before = {name: value.clone() for name, value in workpiece.model.state_dict().items()}
    small = built(workpiece, CANDIDATE, verify=True)
    assert small.get_submodule("stem").out_channels == 6
    assert small.get_submodule("stages.1.0.conv1").out_channels == 9
    assert "stages.0.1.conv1.weight" not in dict(small.named_parameters())
    after = workpiece.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_ranks_before_and_behind_the_cut(workpiece: Workpiece) -> None:
    for first in (True, False):
        candidate = Candidate(
            ranks={"stages.1.0.conv2": 3}, factorize_first=first, counts={"stem.weight[0]": 6}
        )
        small = built(workpiece, candidate)
        assert isinstance(small.get_submodule("stages.1.0.conv2"), nn.Sequential)
        assert small(workpiece.inputs[0]).shape == (2, 10)


def test_the_stages_of_a_recipe_make_the_same_shapes(workpiece: Workpiece, tmp_path: Path) -> None:
    from dwindle.recipe.runner import run_recipe

    recipe = {
        "name": "candidate",
        "model": {"name": "dwindle.zoo:digits_resnet", "arguments": {"widths": [8, 16], "depths": [2, 1]}},
        "data": {"name": "dwindle.zoo:digits", "limit": 64, "test_limit": 64, "batch_size": 32},
        "stages": CANDIDATE.stages(),
    }
    path = tmp_path / "candidate.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run_recipe(path, tmp_path / "run")
    manifests = sorted(result.directory.rglob("manifest.json"), key=lambda own: own.stat().st_mtime)
    small = dw.load(manifests[-1].parent)
    mine = built(workpiece, CANDIDATE)
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in mine.named_parameters()
    }
