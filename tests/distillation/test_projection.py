"""Learned projections: which layer, in which dimension, what they compute, how they are trained and kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller, Projection
from dwindle.distillation.projection import Embedding, channel_dimension, pooled_to
from dwindle.training import compress


@pytest.mark.parametrize(
    ("student", "teacher", "dimension"),
    [
        ((2, 4), (2, 6), 1),
        ((2, 5, 4), (2, 5, 6), 2),  # a sequence
        ((2, 4, 5), (2, 6, 5), 1),  # channels of a signal
        ((2, 5, 4), (2, 7, 6), 2),
        ((2, 4, 8, 8), (2, 6, 8, 8), 1),
        ((2, 8, 8, 4), (2, 8, 8, 6), 3),  # channels last
        ((2, 4, 8, 8), (2, 6, 4, 4), 1),
        ((2, 4, 8, 8), (2, 4, 4, 4), 1),
    ],
)
def test_channels_and_shapes(student: tuple, teacher: tuple, dimension: int) -> None:
    assert channel_dimension(student, teacher) == dimension
    layer = Projection(student, teacher)
    assert (layer.layer is None) is (student[dimension] == teacher[dimension])
    mine, theirs = layer(torch.randn(student), torch.randn(teacher))
    assert mine.shape == theirs.shape
    assert mine.shape[0] == 2


def test_a_map_is_convolved_and_pooled() -> None:
    layer = Projection((2, 4, 8, 8), (2, 6, 4, 4))
    assert isinstance(layer.layer, nn.Conv2d)
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4, requires_grad=True)
    mine, theirs = layer(student, teacher)
    weight, bias = layer.layer.weight[:, :, 0, 0], layer.layer.bias
    mapped = torch.einsum("oc,bchw->bohw", weight, student) + bias[:, None, None]
    torch.testing.assert_close(mine, mapped.reshape(2, 6, 4, 2, 4, 2).mean((3, 5)))
    assert torch.equal(theirs, teacher)
    assert not theirs.requires_grad


def test_embeddings_average_positions() -> None:
    layer = Embedding((2, 4, 8, 8), (2, 5, 6), width=3)
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    mine, theirs = layer(student, teacher)
    torch.testing.assert_close(mine, layer.student(student.mean((2, 3))))
    torch.testing.assert_close(theirs, layer.teacher(teacher.mean(1)))
    with pytest.raises(ConfigError, match="no channels"):
        Embedding((2,), (2, 3))
    with pytest.raises(ConfigError, match="numbers of dimensions"):
        Projection((2, 4), (2, 4, 3))
    with pytest.raises(ConfigError, match="cannot be pooled"):
        pooled_to(torch.zeros(1, 1, 2, 2, 2, 2), (1, 1, 1, 1))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    return student, teacher


X = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
HINT = [{"op_names": ["0"], "apply_method": "hint"}]


def test_hints_are_trained_through_the_users_optimizer_and_kept_in_the_state() -> None:
    student, teacher = pair()
    torch.manual_seed(5)
    distiller = Distiller(student, HINT, teacher=teacher, logits_weight=0.0, example_inputs=X)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))  # the user's random stream
    first = [parameter.detach().clone() for parameter in distiller.parameters()]
    assert [tuple(own.shape) for own in first] == [(6, 4, 1, 1), (6,)]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    with compress(student, [distiller]) as run:
        assert run.add_parameters_to(optimizer) == 2
        losses = []
        for _ in range(30):
            student(X)
            loss = run.loss()
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        state = run.state_dict()
    with torch.no_grad():
        expected = nn.functional.mse_loss(nn.functional.conv2d(pair()[0][0](X), *first), teacher[0](X))
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[-1] < 0.2 * losses[0]
    twin = Distiller(student, HINT, teacher=teacher, logits_weight=0.0, example_inputs=X)
    assert all(
        torch.equal(own, other) for own, other in zip(twin.parameters(), first, strict=True)
    )  # by the seed
    with compress(student, [twin]) as run:
        run.load_state_dict(state)
    for own, other in zip(twin.parameters(), distiller.parameters(), strict=True):
        assert torch.equal(own, other)
    assert twin.steps == 30
    with pytest.raises(ConfigError, match="saved links"):
        Distiller(student, teacher=teacher).load_state_dict(distiller.state_dict())


def test_contrastive_learns_to_tell_samples_apart() -> None:
    student, teacher = pair()
    config = [{"op_names": ["1"], "apply_method": "contrastive", "options": {"width": 8, "temperature": 0.2}}]
    with pytest.raises(ConfigError, match="give example_inputs"):
        Distiller(student, config, teacher=teacher, logits_weight=0.0)
    distiller = Distiller(student, config, teacher=teacher, logits_weight=0.0, example_inputs=(X,))
    assert sum(parameter.numel() for parameter in distiller.parameters()) == (4 + 1) * 8 + (6 + 1) * 8
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    with compress(student, [distiller]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(40):
            student(X)
            loss = run.loss()
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert losses[-1] < 0.5 * losses[0]


def test_shapes_that_cannot_be_compared_are_errors_before_anything_runs() -> None:
    student, teacher = pair()
    with pytest.raises(ConfigError, match=r"0\._output_0 cannot be compared.*'hint' projects"):
        Distiller(student, [{"op_names": ["0"]}], teacher=teacher, example_inputs=X)
    distiller = Distiller(student, HINT, teacher=teacher, logits_weight=0.0)
    with compress(student, [distiller]) as run:
        student(X)
        with pytest.raises(ConfigError, match="give example_inputs, so that a projection is made"):
            run.loss()
