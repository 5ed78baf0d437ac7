"""Answers on disk: asked once, whatever the order; bounded; other weights have other answers; damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.distillation import Distiller, TeacherCache
from dwindle.training import compress

DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))


class Counting(nn.Module):
    """A teacher that counts the samples it is asked; the first batch is asked by half once more, to try it out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.asked = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.asked += len(x)
        return self.head(torch.relu(self.hidden(x))) * scale


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.hidden(x))) * scale


CONFIG = [{"op_names": ["hidden"], "lambda": 0.5}]


def epoch(
    teacher: nn.Module, cache: TeacherCache | str | Path | None, seed: int, **inputs: float
) -> list[float]:
    """Losses of one pass in an order of its own."""
    model = Student()
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(seed))
    with compress(model, [Distiller(model, CONFIG, teacher=teacher, cache=cache)]) as run:
        losses = []
        for chosen in order.split(5):
            model(DATA[chosen], **inputs)
            losses.append(float(run.loss().detach()))
    return losses


def test_a_second_epoch_in_another_order_never_asks_the_teacher(tmp_path: Path) -> None:
    teacher = Counting()
    expected = [epoch(teacher, None, seed) for seed in (0, 1)]
    teacher.asked = 0
    cache = TeacherCache(tmp_path / "answers")
    assert epoch(teacher, cache, 0) == pytest.approx(expected[0], rel=1e-6)
    assert (teacher.asked, cache.misses, cache.hits) == (12 + 2, 12, 0)
    assert epoch(teacher, cache, 1) == pytest.approx(expected[1], rel=1e-6)
    assert (teacher.asked, cache.hits) == (12 + 2, 12)
    assert not list((tmp_path / "answers").rglob("*.part"))
    # After a restart nothing is asked either: the same weights in another object, another path to the cache.
    again = Counting()
    assert epoch(again, str(tmp_path / "answers"), 1) == pytest.approx(expected[1], rel=1e-6)
    assert again.asked == 0


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    teacher, cache = Counting(), TeacherCache(tmp_path)
    model = Student()
    with compress(model, [Distiller(model, teacher=teacher, cache=cache)]) as run:
        model(DATA[:4])
        run.loss()
        model(torch.cat([DATA[2:7], DATA[6:7]]))  # two known, three new, one of them twice
        run.loss()
    assert teacher.asked == (4 + 2) + 3


def test_other_weights_inputs_and_questions_have_other_answers(tmp_path: Path) -> None:
    teacher = Counting()
    cache = TeacherCache(tmp_path)
    first = epoch(teacher, cache, 0)
    assert epoch(teacher, cache, 0, scale=2.0) != pytest.approx(first, rel=1e-3)
    assert teacher.asked == 24 + 2
    with torch.no_grad():
        teacher.head.weight.mul_(1.5)  # in place, in the middle of everything
    changed = epoch(teacher, cache, 0)
    assert teacher.asked == 36 + 2 + 2
    assert changed == pytest.approx(epoch(teacher, None, 0), rel=1e-6)
    model = Student()
    with compress(model, [Distiller(model, teacher=teacher, cache=cache)]) as run:  # no features asked for
        model(DATA)
        run.loss()
    assert teacher.asked == (36 + 2 + 2) + 12 + (12 + 6)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_directory_is_bounded_and_other_teachers_go_first(tmp_path: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))

    old = Counting()
    epoch(old, TeacherCache(tmp_path), 0)
    first = set(tmp_path.rglob("*.safetensors"))
    bound = size() + 200
    new = Counting()
    with torch.no_grad():
        new.head.bias.add_(1.0)
    cache = TeacherCache(tmp_path, max_bytes=bound)
    epoch(new, cache, 0)
    assert size() <= bound
    assert not first <= set(tmp_path.rglob("*.safetensors"))  # the old teacher's went
    new.asked = 0
    tiny = TeacherCache(tmp_path / "tiny", max_bytes=100)
    expected = epoch(new, None, 1)
    assert epoch(new, tiny, 1) == pytest.approx(expected, rel=1e-6)  # nothing stored, nothing wrong
    assert not (tmp_path / "tiny").exists()


def test_damaged_files_are_asked_again(tmp_path: Path) -> None:
    teacher = Counting()
    expected = epoch(teacher, tmp_path, 0)
    broken = sorted(tmp_path.rglob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:-7])
    teacher.asked = 0
    assert epoch(teacher, tmp_path, 0) == pytest.approx(expected, rel=1e-6)
    assert 0 < teacher.asked < 12


class Pairs(nn.Module):
    """Relations of all samples, as many rows as there are samples: its answers do not belong to single samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind, self.asked = nn.Linear(4, 3), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        if self.kind == "mixed":
            return self.linear(x) - self.linear(x).mean(0)
        return (self.linear(x) @ self.linear(x).T).flatten()[:, None] * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("kind", ["mixed", "rows"])
def test_whole_batches_where_samples_cannot_be_told_apart(tmp_path: Path, kind: str) -> None:
    teacher, model = Pairs(kind), Pairs(kind)
    distiller = Distiller(model, teacher=teacher, cache=TeacherCache(tmp_path))
    losses = []
    with compress(model, [distiller]) as run:
        for _ in range(2):
            model(DATA[:4])
            losses.append(float(run.loss().detach()))
            asked = teacher.asked
    assert losses[0] == losses[1]
    with compress(
        model, [Distiller(model, teacher=teacher, cache=TeacherCache(tmp_path, per="batch"))]
    ) as run:
        model(DATA[:4])
        assert float(run.loss().detach()) == losses[0]
    assert teacher.asked == asked


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="per must be"):
        TeacherCache(tmp_path, per="row")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        epoch(Counting(), tmp_path / "file", 0)
