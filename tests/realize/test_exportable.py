"""Pruned models go on through torch.export, ONNX Runtime and torch.compile, in place or rewritten."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import dwindle as dw
from support.architectures.check import example_of
from support.architectures.example import Example

MODELS = [
    "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5",
    "timm/test_vit",
    "hf/bert",
    "hf/llama",
    "own/shifted_windows",
    "own/channel_shuffle_odd",
]


def pruned(name: str) -> tuple[nn.Module, Example]:
    example = example_of(name)
    result = dw.prune(example.model, example.args, example_kwargs=example.kwargs, ratio=0.5)
    assert result.parameters_after < 0.6 * result.parameters_before
    return result.model.eval(), example


def tensors(tree: Any) -> list[torch.Tensor]:
    values = list(tree.values()) if isinstance(tree, dict) else tree
    return [item for item in pytree.tree_leaves(values) if isinstance(item, torch.Tensor)]


def assert_same(first: Any, second: Any) -> None:
    for one, other in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime(name: str, tmp_path: Path) -> None:
    model, example = pruned(name)
    inputs = tuple(example.args) if example.args else dict(example.kwargs)
    exported = dw.export(model, tmp_path / "small.onnx", inputs, tolerance=1e-4)
    assert exported.checked_in is not None
    assert exported.relative_difference <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str) -> None:
    model, example = pruned(name)
    if name == "hf/llama":
        example.kwargs["use_cache"] = (
            False  # a cache in the outputs is a class that torch.export does not know
        )
    with torch.no_grad():
        program = torch.export.export(model, tuple(example.args), dict(example.kwargs))
        assert_same(model(*example.args, **example.kwargs), program.module()(*example.args, **example.kwargs))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_vit", "hf/llama"])
def test_compiled_and_trained(name: str) -> None:
    """The backend takes the graph apart as inductor does, with its backward, but writes no C++."""
    model, example = pruned(name)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        assert_same(model(*example.args, **example.kwargs), compiled(*example.args, **example.kwargs))
    compiled.train()
    output = tensors(compiled(*example.args, **example.kwargs))[0]
    output.square().mean().backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    model, example = pruned("timm/test_resnet")
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        assert_same(model(*example.args), compiled(*example.args))


class Literal(nn.Module):
    """A size that stands in the code: nothing in place can correct it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 32)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(self.norm(x))).view(-1, 32)
        return self.last(torch.relu(self.second(y)))


def test_rewritten_on_request(tmp_path: Path) -> None:
    model, x = Literal(), torch.randn(2, 6)
    before = {key: held.clone() for key, held in model.state_dict().items()}
    kept = dw.prune(copy.deepcopy(model), x, ratio=0.5)
    assert any("rewrite=True" in note and __file__ in note for note in kept.notes)
    assert kept.model.first.out_features == 32
    result = dw.prune(model, x, ratio=0.5, rewrite=True)
    small = result.model
    assert result.plan.rewritten
    assert result.verification.max_difference <= 1e-9
    assert result.verification.batch_sizes[0] != result.verification.batch_sizes[1]
    assert small.state_dict()["first.weight"].shape == (16, 6)
    assert all(torch.equal(model.state_dict()[key], held) for key, held in before.items())
    # any batch, trains, exports, saves
    assert small(torch.randn(7, 6)).shape == (7, 5)
    small(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    small.eval()
    program = torch.export.export(small, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    y = torch.randn(5, 6)
    torch.testing.assert_close(program.module()(y), small(y))
    assert dw.export(small, tmp_path / "small.onnx", (x,), tolerance=1e-4).dynamic_batch
    dw.save(small, tmp_path / "saved", example_inputs=(x,))
    torch.testing.assert_close(dw.load(tmp_path / "saved")(y), small(y))


def test_no_rewriting_where_no_literal_is_cut() -> None:
    model, x = Literal(), torch.randn(2, 6)
    result = dw.prune(model, x, ratio=0.5, rewrite=True, ignore=["first", "second.weight"])
    assert not result.plan.rewritten
    assert result.model is model
