"""Every formula against its definition in NumPy and float64, with gradients checked by finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dwindle import distillation as d
from dwindle.config.errors import ConfigError
from dwindle.config.schema import DISTILLATION_METHODS

Array = np.ndarray


def softmax(logits: Array, axis: int = -1) -> Array:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def attention(student: Array, teacher: Array) -> float:
    def map_of(values: Array) -> Array:
        own = (np.abs(values) ** 2).sum(1).reshape(len(values), -1)
        return own / np.sqrt((own**2).sum(1, keepdims=True))

    return float(((map_of(student) - map_of(teacher)) ** 2).sum(1).mean())


def attention_of_tokens(student: Array, teacher: Array) -> float:
    return attention(student.transpose(0, 2, 1), teacher.transpose(0, 2, 1))


def map_divergence(student: Array, teacher: Array) -> float:
    return float((teacher * np.log(teacher / student)).sum(-1).mean())


def relations(student: Array, teacher: Array) -> float:
    total = []
    for own, other in zip(student, teacher, strict=True):
        for head in range(2):
            parts = []
            for values in (own, other):
                width = values.shape[1] // 2
                part = values[:, head * width : (head + 1) * width]
                parts.append(softmax(part @ part.T / np.sqrt(width)))
            total.append((parts[1] * np.log(parts[1] / parts[0])).sum(1).mean())
    return float(np.mean(total))


def distances(student: Array, teacher: Array) -> float:
    pairs = list(itertools.combinations(range(len(student)), 2))

    def relative(values: Array) -> Array:
        own = np.array([np.linalg.norm(values[i] - values[j]) for i, j in pairs])
        return own / own.mean()

    return float(np.mean([huber(x) for x in relative(student) - relative(teacher)]))


def angles(student: Array, teacher: Array) -> float:
    def cosine(values: Array, i: int, j: int, k: int) -> float:
        first, second = values[i] - values[j], values[k] - values[j]
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    triplets = itertools.permutations(range(len(student)), 3)
    return float(np.mean([huber(cosine(student, *own) - cosine(teacher, *own)) for own in triplets]))


def products(student: Array, teacher: Array) -> float:
    def matrix(values: Array) -> Array:
        own = values.reshape(len(values), -1)
        own = own @ own.T
        return own / np.linalg.norm(own, axis=1, keepdims=True)

    return float(((matrix(student) - matrix(teacher)) ** 2).sum() / len(student) ** 2)


def neighbours(student: Array, teacher: Array) -> float:
    def probability(values: Array, i: int, j: int) -> float:
        def kernel(a: Array, b: Array) -> float:
            return float((a @ b / np.linalg.norm(a) / np.linalg.norm(b) + 1) / 2)

        return kernel(values[i], values[j]) / sum(
            kernel(values[i], values[k]) for k in range(len(values)) if k != i
        )

    count = len(student)
    total = 0.0
    for i, j in itertools.permutations(range(count), 2):
        p, q = probability(teacher, i, j), probability(student, i, j)
        total += p * np.log(p / q)
    return total / count


def norm_direction(student: Array, teacher: Array) -> float:
    each = []
    for own, other in zip(student, teacher, strict=True):
        length = np.linalg.norm(other)
        each.append(1 - own @ (other / length) / max(np.linalg.norm(own), length))
    return float(np.mean(each))


def info_nce(student: Array, teacher: Array) -> float:
    unit = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in (student, teacher)]
    logits = unit[0] @ unit[1].T / 0.2
    return float(-np.log(np.diag(softmax(logits, 1))).mean() - np.log(np.diag(softmax(logits, 0))).mean())


def decoupled(student: Array, teacher: Array) -> float:
    temperature, total = 3.0, 0.0
    for own, other in zip(student, teacher, strict=True):
        target = int(other.argmax())
        p, q = softmax(other / temperature), softmax(own / temperature)
        binary = p[target] * np.log(p[target] / q[target])
        binary += (1 - p[target]) * np.log((1 - p[target]) / (1 - q[target]))
        rest_p = np.delete(p, target) / (1 - p[target])
        rest_q = np.delete(q, target) / (1 - q[target])
        total += temperature**2 * (0.5 * binary + 2.0 * (rest_p * np.log(rest_p / rest_q)).sum())
    return total / len(student)


def correlated(student: Array, teacher: Array) -> float:
    p, q = softmax(teacher / 2.0), softmax(student / 2.0)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(4.0 * (1.5 * rows + 0.5 * columns))


#: Formula, its definition, options, shapes of student and teacher, whether they hold probabilities.
CASES: dict[str, tuple[Callable, Callable, dict, tuple, tuple, bool]] = {
    "attention_transfer": (d.attention_transfer, attention, {}, (3, 4, 2, 3), (3, 5, 2, 3), False),
    "attention_transfer tokens": (
        d.attention_transfer, attention_of_tokens, {"power": 2.0}, (3, 5, 4), (3, 5, 2), False),
    "attention_map": (d.attention_map_divergence, map_divergence, {}, (2, 2, 3, 3), (2, 2, 3, 3), True),
    "attention_map_mse": (
        d.attention_map_error, lambda s, t: ((s - t) ** 2).mean(), {}, (2, 2, 3, 3), (2, 2, 3, 3), True),
    "token_relations": (d.token_relations, relations, {"heads": 2}, (2, 3, 4), (2, 3, 6), False),
    "relation_distance": (d.relation_distances, distances, {}, (4, 3), (4, 5), False),
    "relation_angle": (d.relation_angles, angles, {}, (4, 3), (4, 5), False),
    "similarity": (d.similarity, products, {}, (3, 2, 2), (3, 5), False),
    "pkt": (d.neighbour_probabilities, neighbours, {}, (4, 3), (4, 5), False),
    "norm_direction": (d.norm_and_direction, norm_direction, {}, (4, 3), (4, 3), False),
    "contrastive": (d.contrastive, info_nce, {"temperature": 0.2}, (4, 3), (4, 3), False),
    "dkd": (
        d.decoupled_divergence, decoupled, {"temperature": 3.0, "target_weight": 0.5, "other_weight": 2.0},
        (4, 5), (4, 5), False),
    "dist": (
        d.correlation_distance, correlated, {"temperature": 2.0, "class_weight": 1.5, "sample_weight": 0.5},
        (4, 5), (4, 5), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_formula_and_gradient(name: str) -> None:
    loss, definition, options, own, other, probabilities = CASES[name]
    random = np.random.default_rng(3)
    student, teacher = random.normal(size=own), random.normal(size=other)
    if probabilities:
        student, teacher = softmax(student), softmax(teacher)
    tensors = torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher).requires_grad_()
    value = loss(*tensors, **options)
    assert value.dim() == 0
    assert float(value.detach()) == pytest.approx(definition(student, teacher), rel=1e-10)
    assert torch.autograd.gradcheck(lambda own: loss(own, tensors[1].detach(), **options), tensors[0])
    value.backward()
    assert (tensors[1].grad is not None) is (
        name == "contrastive"
    )  # there the teacher's embedding learns too
    half = loss(tensors[0].detach().bfloat16(), tensors[1].detach().bfloat16(), **options)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(definition(student, teacher), rel=0.1, abs=0.01)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("contrastive",)])
def test_a_student_that_is_the_teacher_has_no_loss(name: str) -> None:
    loss, _, options, own, _, probabilities = CASES[name]
    leaf = torch.randn(*own, dtype=torch.float64, requires_grad=True)
    tensor = leaf.softmax(-1) if probabilities else leaf
    value = loss(tensor, tensor.detach(), **options)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
    assert leaf.grad is not None
    if name != "norm_direction":  # the larger of two equal norms is a kink
        assert float(leaf.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "name", ["relation_distance", "relation_angle", "similarity", "pkt", "norm_direction"]
)
def test_equal_samples_give_no_nan(name: str) -> None:
    student = torch.ones(4, 3, requires_grad=True)
    value = d.feature_loss(name, student, torch.randn(4, 3))
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_maps_of_other_sizes_are_pooled_and_heads_averaged() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)
    pooled = torch.nn.functional.avg_pool2d(teacher.square().sum(1, keepdim=True), 2).sqrt()
    assert float(d.attention_transfer(student, teacher)) == pytest.approx(
        float(d.attention_transfer(student, pooled)), rel=1e-5
    )
    maps = torch.randn(2, 4, 3, 3).softmax(-1), torch.randn(2, 2, 3, 3).softmax(-1)
    assert float(d.attention_map_divergence(*maps)) == pytest.approx(
        float(d.attention_map_divergence(maps[0].mean(1), maps[1].mean(1))), rel=1e-6
    )


def test_labels_of_dkd_and_logits_of_images() -> None:
    student, teacher = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    labels = torch.randint(0, 4, (2, 3, 3))
    rows = [own.permute(0, 2, 3, 1).reshape(-1, 4) for own in (student, teacher)]
    given = d.decoupled_divergence(student, teacher, dim=1, target=labels)
    assert float(given) == pytest.approx(float(d.decoupled_divergence(*rows, target=labels.reshape(-1))))
    assert float(d.correlation_distance(student, teacher, dim=1)) == pytest.approx(
        float(d.correlation_distance(*rows))
    )


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("attention_transfer", ((2, 3), (2, 3)), "maps"),
        ("attention_map", ((2, 3, 3), (2, 4, 4)), "same tokens"),
        ("token_relations", ((2, 3, 4), (2, 5, 4)), "same tokens"),
        ("relation_distance", ((1, 3), (1, 3)), "at least 2"),
        ("relation_angle", ((2, 3), (2, 3)), "at least 3"),
        ("similarity", ((2, 3), (3, 3)), "number of samples"),
        ("norm_direction", ((2, 3), (2, 4)), "differ in shape"),
        ("contrastive", ((2, 3, 4), (2, 3, 4)), "embeddings"),
        ("dkd", ((2, 2), (2, 2)), "2 classes"),
        ("dist", ((2, 3), (2, 4)), "differ in shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shapes: tuple, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        d.feature_loss(name, torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_options_are_checked() -> None:
    x = torch.randn(4, 6, 8)
    with pytest.raises(ConfigError, match=r"no option 'head'.*did you mean 'heads'"):
        d.feature_loss("token_relations", x, x, head=2)
    with pytest.raises(ConfigError, match="whole number"):
        d.feature_loss("token_relations", x, x, heads=2.5)
    with pytest.raises(ConfigError, match="do not divide the width 8"):
        d.feature_loss("token_relations", x, x, heads=3)
    with pytest.raises(ConfigError, match="'temperature' must be above 0"):
        d.feature_loss("dist", x[:, 0], x[:, 0], temperature=0.0)
    with pytest.raises(ConfigError, match="it has no options"):
        d.feature_loss("similarity", x, x, temperature=1.0)


def test_the_schema_and_the_table_know_the_same_methods() -> None:
    assert tuple(d.METHODS) == DISTILLATION_METHODS
