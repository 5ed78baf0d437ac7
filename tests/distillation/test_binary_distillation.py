"""Logits that are a yes or no each, and models with several outputs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller, binary_divergence, divergence, feature_loss


def by_definition(student: np.ndarray, teacher: np.ndarray, temperature: float, axis: int) -> float:
    p, q = 1 / (1 + np.exp(-teacher / temperature)), 1 / (1 + np.exp(-student / temperature))
    each = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(axis)
    return float(temperature**2 * each.mean())


@pytest.mark.parametrize(("shape", "dim"), [((7, 5), -1), ((2, 1, 3, 4), 1), ((2, 5, 3, 4), 1), ((5,), 0)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_by_its_definition(shape, dim, temperature):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=shape) * 3, random.normal(size=shape) * 3
    got = binary_divergence(torch.from_numpy(student), torch.from_numpy(teacher), temperature, dim)
    assert float(got) == pytest.approx(by_definition(student, teacher, temperature, dim), rel=1e-12)


def test_two_classes_are_one_yes_or_no():
    """A softmax over (0, x) is a sigmoid of x: the two losses are one there."""
    student, teacher = torch.randn(9, 1, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    zeros = torch.zeros(9, 1, dtype=torch.float64)
    pairs = [torch.cat([zeros, logits], 1) for logits in (student, teacher)]
    torch.testing.assert_close(
        binary_divergence(student, teacher, 2.0), divergence(*pairs, 2.0), rtol=1e-12, atol=0
    )


def test_gradient_and_far_out_logits():
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    binary_divergence(student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).sigmoid() - (teacher / 3).sigmoid()) / 6
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-10, atol=1e-14)
    assert teacher.grad is None
    far = torch.tensor([300.0, -300.0, 300.0])
    assert binary_divergence(far, far) == 0
    assert torch.isfinite(binary_divergence(-far, far))


def test_links_know_classes_and_yes_or_no():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    same = divergence(student, teacher, 2.0, dim=1)
    torch.testing.assert_close(feature_loss("classes", student, teacher, temperature=2.0), same)
    same = binary_divergence(student, teacher, dim=1)
    torch.testing.assert_close(feature_loss("binary", student, teacher), same)


def test_one_class_says_nothing():
    with pytest.raises(ConfigError, match="'binary'"):
        divergence(torch.randn(4, 1), torch.randn(4, 1))
    with pytest.raises(ConfigError, match="'binary'"):
        feature_loss("classes", torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3))


class TwoLevels(nn.Module):
    """One head on two levels, two answers each."""

    def __init__(self):
        super().__init__()
        self.body, self.score, self.sides = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 1, 1),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x):
        fine = self.body(x).relu()
        coarse = nn.functional.avg_pool2d(fine, 2)
        return {
            f"{level}_{name}": getattr(self, name)(own)
            for level, own in (("fine", fine), ("coarse", coarse))
            for name in ("score", "sides")
        }


def test_several_outputs_of_a_head_that_is_called_twice():
    torch.manual_seed(0)
    teacher = TwoLevels().eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.score.weight.add_(0.3)
        model.sides.bias.add_(0.1)
    x = torch.randn(3, 1, 8, 8)
    distiller = Distiller(
        model,
        [
            {"op_names": ["score"], "apply_method": "binary", "lambda": 20.0},
            {"op_names": ["sides"], "apply_method": "mse", "lambda": 1.0},
        ],
        teacher=teacher,
        logits_weight=0,
        example_inputs=x,
    )
    with dw.compress(model, [distiller]) as run:
        mine = model(x)
        loss = run.loss()
    theirs = teacher(x)
    expected = sum(
        20.0 * binary_divergence(mine[f"{level}_score"], theirs[f"{level}_score"], dim=1)
        + nn.functional.mse_loss(mine[f"{level}_sides"], theirs[f"{level}_sides"])
        for level in ("fine", "coarse")
    )
    torch.testing.assert_close(loss, expected / 2, rtol=1e-5, atol=1e-7)  # the mean over the two calls
    assert float(loss.detach()) > 0.01
