"""Which module of the teacher a student's module is compared with, when nobody says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller
from dwindle.distillation.matching import corresponding_path, evenly_spaced
from dwindle.training import compress
from dwindle.zoo import residual_network

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("count", "other", "expected"),
    [
        (3, 6, [1, 3, 5]),
        (4, 12, [2, 5, 8, 11]),
        (2, 3, [1, 2]),
        (1, 5, [4]),
        (3, 3, [0, 1, 2]),
        (4, 2, [0, 0, 1, 1]),
    ],
)
def test_blocks_are_spread_evenly(count: int, other: int, expected: list[int]) -> None:
    assert [evenly_spaced(position, count, other) for position in range(count)] == expected


def taught(distiller: Distiller) -> dict[str, tuple[str, str]]:
    return {link.module: (link.teacher_modules[0], link.matched) for link in distiller.links}


def loss_and_gradient(model: nn.Module, distiller: Distiller, x: Tensor = X) -> float:
    with compress(model, [distiller]) as run:
        model(x)
        loss = run.loss()
        loss.backward()
    assert any(own.grad is not None and float(own.grad.abs().max()) > 0 for own in model.parameters())
    return float(loss.detach())


class Stages(nn.Module):
    """Stages of residual blocks, as in a ResNet: the first block of each stage has another shortcut."""

    def __init__(self, blocks: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        widths = (4, 8)
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            entry = widths[max(number - 1, 0)]
            stage = [
                Block(entry if place == 0 else width, width, 1 + (place == 0 < number))
                for place in range(count)
            ]
            setattr(self, f"layer{number + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, entry: int, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(entry, width, 3, stride, 1)
        self.shortcut = nn.Conv2d(entry, width, 1, stride) if stride > 1 or entry != width else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + (x if self.shortcut is None else self.shortcut(x)))


def test_a_resnet_with_fewer_blocks() -> None:
    torch.manual_seed(0)
    student, teacher = Stages((1, 2)), Stages((2, 4))
    config = [
        {"op_types": ["Block"], "lambda": 0.5},
        {"op_names": ["layer2.0.shortcut", "fc", "layer2.1.conv"]},
    ]
    distiller = Distiller(student, config, teacher=teacher, example_inputs=X)
    assert taught(distiller) == {
        "layer1.0": ("layer1.1", "path"),
        "layer2.0": ("layer2.1", "path"),
        "layer2.1": ("layer2.3", "path"),
        "layer2.1.conv": ("layer2.3.conv", "path"),
        "layer2.0.shortcut": ("layer2.0.shortcut", "path"),  # layer2.1 has none: the same path
        "fc": ("fc", "path"),
    }
    assert loss_and_gradient(student, distiller) > 0
    lines = distiller.summary().splitlines()
    assert lines[0].split() == ["student", "teacher", "method", "lambda", "matched", "by", "shapes"]
    row = next(line for line in lines if line.startswith("layer2.1._output_0"))
    assert row.split()[:5] == ["layer2.1._output_0", "layer2.3", "mse", "0.5", "path"]
    assert "(4, 8, 4, 4) and (4, 8, 4, 4)" in row


def test_a_pruned_student_gets_projections() -> None:
    torch.manual_seed(0)
    model = residual_network((8, 16), (1, 1), classes=3)
    teacher = copy.deepcopy(model)
    small = dw.prune(model, (X,), ratio=0.5).model
    config = [{"op_names_re": [r"stages[.]\d+$"], "apply_method": "hint"}]
    distiller = Distiller(small, config, teacher=teacher, example_inputs=X)
    assert taught(distiller) == {f"stages.{number}": (f"stages.{number}", "path") for number in (0, 1)}
    shapes = [tuple(own.shape) for own in distiller.parameters() if own.dim() == 4]
    assert shapes == [(8, 4, 1, 1), (16, 8, 1, 1)]
    assert loss_and_gradient(small, distiller) > 0
    relational = [{"op_names_re": [r"stages[.]\d+$"], "apply_method": method} for method in ("similarity",)]
    assert not list(Distiller(small, relational, teacher=teacher, example_inputs=X).parameters())


class Text(nn.Module):
    """A transformer with its layers in a list."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_transformer_with_half_of_the_layers() -> None:
    torch.manual_seed(0)
    student, teacher = Text(2, 8), Text(4, 12)
    tokens = torch.randint(0, 11, (4, 5))
    config = [
        {"op_names_re": [r"layers[.]\d+$"], "apply_method": "hint"},
        {"op_types": ["LayerNorm"], "op_names_re": [".*norm1"], "apply_method": "token_relations",
         "options": {"heads": 2}},
    ]  # fmt: skip
    distiller = Distiller(student, config, teacher=teacher, example_inputs=(tokens,))
    assert taught(distiller) == {
        "layers.0": ("layers.1", "path"),
        "layers.0.norm1": ("layers.1.norm1", "path"),
        "layers.1": ("layers.3", "path"),
        "layers.1.norm1": ("layers.3.norm1", "path"),
    }
    assert [tuple(own.shape) for own in distiller.parameters()] == [(12, 8), (12,)] * 2
    assert loss_and_gradient(student, distiller, tokens) > 0


class Other(nn.Module):
    """Another family: other names, another number of blocks, the same sizes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.Sequential(*(Block(6, 6, 1) for _ in range(2)))
        self.narrow = nn.Sequential(Block(6, 10, 2), Block(10, 10, 1), Block(10, 10, 1))
        self.classifier = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.narrow(self.body(self.first(x))).mean((2, 3)))


def test_another_family_is_matched_by_shape_and_depth() -> None:
    torch.manual_seed(0)
    student, teacher = Stages((1, 2)), Other()
    config = [{"op_types": ["Block"], "apply_method": "hint"}]
    distiller = Distiller(student, config, teacher=teacher, example_inputs=X)
    assert taught(distiller) == {
        "layer1.0": ("body.1", "shape"),
        "layer2.0": ("narrow.1", "shape"),
        "layer2.1": ("narrow.2", "shape"),
    }
    assert loss_and_gradient(student, distiller) > 0
    with pytest.raises(ConfigError, match="give example_inputs so that it is matched by its shape"):
        Distiller(student, config, teacher=teacher)
    with pytest.raises(ConfigError, match="name one with 'link'"):
        Distiller(
            student, [{"op_names": ["layer1.0"], "target_names": ["_input_0"], "apply_method": "hint"}],
            teacher=teacher, example_inputs=X,
        )  # fmt: skip


def test_lists_of_different_modules_are_matched_by_their_numbers() -> None:
    student = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    teacher = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert [corresponding_path(name, student, teacher) for name in ("0", "2", "")] == ["0", "2", ""]
