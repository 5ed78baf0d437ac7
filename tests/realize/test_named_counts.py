"""``dw.prune(counts=, blocks=)``: what stays and what goes, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle import zoo


def _model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.digits_resnet((8, 16), (2, 1)).eval()


INPUTS = (torch.randn(2, 1, 8, 8),)


def test_counts_and_blocks_are_as_they_are_named() -> None:
    model = _model()
    result = dw.prune(
        model, INPUTS, counts={"stages.1.0.conv1.weight[0]": 5, "stem.weight[0]": 6}, blocks=["stages.0.1"]
    )
    assert result.verification is not None
    assert model.get_submodule("stages.1.0.conv1").out_channels == 5
    assert model.get_submodule("stem").out_channels == 6
    assert model.get_submodule("stages.1.0.conv2").out_channels == 16
    assert not any(name.startswith("stages.0.1.conv") for name, _ in model.named_parameters())


def test_any_place_of_an_axis_names_it() -> None:
    one, other = _model(), _model()
    dw.prune(one, INPUTS, counts={"stem.weight[0]": 4})
    dw.prune(other, INPUTS, counts={"stages.0.0.conv1.weight[1]": 4})
    for own, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, twin)


def test_the_most_important_indices_stay() -> None:
    model = _model()
    before = model.get_submodule("stages.1.0.conv1").weight.detach().clone()
    with torch.no_grad():
        model.get_submodule("stages.1.0.conv1").weight[[1, 3]] *= 100.0
    dw.prune(model, INPUTS, counts={"stages.1.0.conv1.weight[0]": 2})
    kept = model.get_submodule("stages.1.0.conv1").weight
    assert torch.allclose(kept, 100.0 * before[[1, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": {"stem.wight[0]": 4}}, "did you mean 'stem.weight"),
        ({"counts": {"stem.weight[0]": 9}}, "from 1 to its size 8"),
        ({"counts": {"stem.weight[0]": 0}}, "from 1 to its size 8"),
        ({"counts": {"stem.weight[0]": 4, "stages.0.0.conv1.weight[1]": 5}}, "are one axis"),
        ({"counts": {}, "ratio": 0.5}, "give either ratio"),
        ({"blocks": ["stages.0.2"]}, "did you mean 'stages.0"),
        ({"blocks": ["stages.1.0"]}, "stages.1.0"),
        ({"counts": {"stem.weight[0]": 4}, "axes": ["block"]}, "leave ratios="),
    ],
)
def test_mistakes_are_named_and_the_model_stays(options: dict[str, object], message: str) -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(dw.ConfigError, match=message):
        dw.prune(model, INPUTS, **options)  # type: ignore[arg-type]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
