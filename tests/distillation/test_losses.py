"""The formulas against NumPy in float64."""

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.distillation import divergence, feature_loss
from dwindle.distillation.losses import class_dimension


def numpy_divergence(student: np.ndarray, teacher: np.ndarray, temperature: float, axis: int) -> float:
    """T^2 times the mean over positions of sum p log(p / q), by its definition."""

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits / temperature - (logits / temperature).max(axis=axis, keepdims=True))
        return powers / powers.sum(axis=axis, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    each = (p * np.log(p / q)).sum(axis=axis)
    return float(temperature**2 * each.mean())


@pytest.mark.parametrize(("shape", "dim"), [((7, 5), -1), ((2, 6, 5), -1), ((2, 5, 3, 4), 1), ((5,), 0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_divergence(shape, dim, temperature):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=shape) * 3, random.normal(size=shape) * 3
    got = divergence(torch.from_numpy(student), torch.from_numpy(teacher), temperature, dim)
    assert got.dim() == 0
    assert float(got) == pytest.approx(numpy_divergence(student, teacher, temperature, dim), rel=1e-12)


def test_gradient_of_divergence_is_hintons():
    """For logits of shape (batch, classes): T * (q - p) / batch."""
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    divergence(student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 6
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


def test_features():
    random = np.random.default_rng(1)
    student, teacher = random.normal(size=(3, 4, 5)), random.normal(size=(3, 4, 5))
    tensors = torch.from_numpy(student), torch.from_numpy(teacher)
    assert float(feature_loss("mse", *tensors)) == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-13)
    # NNI's kl: softened by 2, last dimension, divided by the size of the first one alone.
    expected = numpy_divergence(student, teacher, 2.0, -1) * 4
    assert float(feature_loss("kl", *tensors)) == pytest.approx(expected, rel=1e-12)


def test_equal_tensors_have_no_distance_and_half_precision_is_widened():
    logits = torch.randn(4, 10)
    assert float(divergence(logits, logits, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
    assert feature_loss("mse", logits.half(), logits.half()).dtype == torch.float32


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match=r"\(2, 3\) and \(2, 4\)"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="temperature"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(ConfigError, match="'cos' is not one of mse, kl"):
        feature_loss("cos", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ConfigError, match="dimension"):
        feature_loss("kl", torch.tensor(1.0), torch.tensor(1.0))


def test_where_the_classes_stand():
    assert class_dimension(torch.zeros(2, 3)) == class_dimension(torch.zeros(2, 5, 3)) == -1
    assert class_dimension(torch.zeros(2, 3, 4, 4)) == 1
