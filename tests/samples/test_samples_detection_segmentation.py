"""The samples of detection and segmentation: metrics against brute force, data, and whole runs that take seconds."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import dwindle as dw

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from batches import Batches  # noqa: E402
from detection import boxes as detection_boxes  # noqa: E402
from detection import data as detection_data  # noqa: E402
from detection.loss import detection_loss, targets  # noqa: E402
from detection.model import REACH, STRIDES, FaceDetector, places  # noqa: E402
from segmentation import data as segmentation_data  # noqa: E402
from segmentation.metric import confusion, mean_intersection_over_union  # noqa: E402
from segmentation.model import UNet  # noqa: E402


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, generator=generator) * 20
    return torch.cat([corners, corners + 4 + 8 * torch.rand(count, 2, generator=generator)], 1)


def drawn(box: Tensor, size: int = 40) -> np.ndarray:
    """The box as pixels."""
    left, top, right, bottom = (int(side) for side in box)
    picture = np.zeros((size, size), dtype=bool)
    picture[top:bottom, left:right] = True
    return picture


def test_overlap_is_that_of_drawn_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_boxes(6, generator).round(), random_boxes(7, generator).round()
    expected = [[(drawn(a) & drawn(b)).sum() / (drawn(a) | drawn(b)).sum() for b in second] for a in first]
    torch.testing.assert_close(
        detection_boxes.overlap(first, second),
        torch.tensor(expected, dtype=torch.float32),
        rtol=1e-5,
        atol=1e-6,
    )


def test_what_stays_is_the_best_and_overlaps_little() -> None:
    generator = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(30, generator), torch.rand(30, generator=generator)
    kept = detection_boxes.suppress(boxes, scores, 0.3).tolist()
    overlaps = detection_boxes.overlap(boxes, boxes)
    stay: list[int] = []
    for index in sorted(range(30), key=lambda own: -scores[own]):
        if all(overlaps[index, other] <= 0.3 for other in stay):
            stay.append(index)
    assert kept == stay
    assert 1 < len(kept) < 30


def precision_and_recall(found: Any, truth: list[Tensor], least: float) -> tuple[float, float]:
    """Everything anew for detections with at least one score: matched in each picture, best first."""
    right = told = 0
    for (boxes, scores), true in zip(found, truth, strict=True):
        taken: set[int] = set()
        for index in sorted(range(len(scores)), key=lambda own: -scores[own]):
            if scores[index] < least:
                continue
            told += 1
            overlaps = detection_boxes.overlap(boxes[index][None], true)[0].tolist() if len(true) else []
            if overlaps and max(overlaps) >= 0.5 and overlaps.index(max(overlaps)) not in taken:
                taken.add(overlaps.index(max(overlaps)))
                right += 1
    return right / told, right / sum(len(own) for own in truth)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_the_area_under_all_thresholds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = [random_boxes(count, generator) for count in (3, 0, 1, 4)]
    found = []
    for true in truth:
        near = true + torch.randn(true.shape, generator=generator)
        boxes = torch.cat([near, near + 0.3, random_boxes(2, generator)])
        found.append((boxes, torch.rand(len(boxes), generator=generator)))
    thresholds = sorted({float(score) for _, scores in found for score in scores})
    points = [precision_and_recall(found, truth, least) for least in thresholds]
    recalls = sorted({0.0, *(recall for _, recall in points)})
    area = sum(
        (above - below) * max(precision for precision, recall in points if recall >= above)
        for below, above in itertools.pairwise(recalls)
    )
    padded = [torch.cat([own, torch.full((2, 4), float("nan"))]) for own in truth]
    assert detection_boxes.average_precision(found, padded) == pytest.approx(area, abs=1e-9)
    assert 0.05 < area < 0.95


def test_average_precision_at_its_ends() -> None:
    truth = [torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 5, 9, 9]])]
    sure = torch.ones(1)
    assert detection_boxes.average_precision([(own, sure) for own in truth], truth) == 1.0
    assert detection_boxes.average_precision([(own + 30, sure) for own in truth], truth) == 0.0
    nothing = (torch.zeros(0, 4), torch.zeros(0))
    assert detection_boxes.average_precision([nothing, nothing], truth) == 0.0
    assert np.isnan(detection_boxes.average_precision([nothing], [torch.zeros(0, 4)]))


def test_equal_boxes_counts_from_both_sides() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    scores = torch.tensor([0.9, 0.5, 0.1])
    one = [(boxes, scores)]
    assert detection_boxes.equal_boxes(one, one) == 1.0
    assert detection_boxes.equal_boxes(one, [(boxes[:1], scores[:1])]) == pytest.approx(2 / 3)
    assert detection_boxes.equal_boxes(one, [(boxes, scores - 0.06)]) == 0.0
    assert detection_boxes.equal_boxes([(boxes[:0], scores[:0])], [(boxes[:0], scores[:0])]) == 1.0


def test_answers_made_of_targets_are_the_faces() -> None:
    """What the loss asks for, said by a detector, gives the boxes back; and its loss is nearly nothing."""
    truth = torch.tensor(
        [
            [[10.0, 12, 26, 28], [50, 50, 86, 86], [np.nan] * 4],
            [[60, 4, 90, 34], [5, 60, 22, 77], [40, 40, 55, 55]],
        ]
    )
    answers = {}
    for level, stride in STRIDES.items():
        wanted, sides, counts = targets(level, truth, 96 // stride, 96 // stride)
        assert wanted.sum() > 0
        assert counts[wanted > 0].all()
        assert 0 < (counts == 0).sum() < counts.numel() / 2
        answers[f"{level}_scores"] = (wanted * 20 - 10).unsqueeze(1)
        answers[f"{level}_sides"] = sides.movedim(-1, 1).nan_to_num().clamp(min=0)
    found = detection_boxes.detections(answers)
    assert detection_boxes.average_precision(found, list(truth), 0.99) == 1.0
    assert detection_loss(answers, truth) < 1e-3
    worse = {**answers, "fine_scores": answers["fine_scores"] - 12}
    assert detection_loss(worse, truth) > 0.2
    assert places("fine", 2, 3)[:, 1, 2].tolist() == [10.0, 6.0]
    assert REACH["coarse"] > REACH["fine"]


def test_scenes_with_faces() -> None:
    pytest.importorskip("skimage")
    one, again = detection_data.scenes("test", 12, seed=3), detection_data.scenes("test", 12, seed=3)
    assert torch.equal(one.images, again.images)
    assert one.images.shape == (12, 1, 96, 96)
    assert one.images.abs().max() <= 1
    boxes = one.boxes[~one.boxes.isnan().any(-1)]
    assert 5 < len(boxes) < 48
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert sizes.min() > 13.9
    assert sizes.max() < 40.1
    assert not set(detection_data.PHOTOGRAPHS["train"]) & set(detection_data.PHOTOGRAPHS["test"])
    images, turned = detection_data.augment(one.images, one.boxes, torch.Generator().manual_seed(0))
    assert images.shape == one.images.shape
    mirrored = [
        not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(turned, one.boxes, strict=True)
    ]
    for index in (own for own, done in enumerate(mirrored) if done):
        torch.testing.assert_close(turned[index, :, 0], 96 - one.boxes[index, :, 2], equal_nan=True)
    assert 0 < sum(mirrored) < 12


def test_mean_intersection_over_union_by_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (3, 9, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, 9, generator=generator) < 0.6, predicted, 3)
    shares = []
    for own in range(4):
        told, true = (predicted == own).numpy(), (labels == own).numpy()
        shares.append((told & true).sum() / (told | true).sum())
    counts = confusion(predicted, labels, 6)  # two classes that nobody saw or said do not count
    assert counts.sum() == 243
    assert counts[3, 1] == ((labels == 3) & (predicted == 1)).sum()
    assert mean_intersection_over_union(counts) == pytest.approx(np.mean(shares), rel=1e-12)
    assert mean_intersection_over_union(confusion(labels, labels, 6)) == 1.0


def test_scenes_with_shapes() -> None:
    pytest.importorskip("skimage")
    one, again = segmentation_data.scenes("test", 8, seed=1), segmentation_data.scenes("test", 8, seed=1)
    assert torch.equal(one.images, again.images)
    assert one.images.shape == (8, 3, 64, 64)
    assert one.labels.shape == (8, 64, 64)
    assert set(one.labels.unique().tolist()) <= set(range(len(segmentation_data.CLASSES)))
    assert 0.02 < (one.labels > 0).float().mean() < 0.7
    shape = torch.zeros(4, 3, 64, 64)
    shape[:, :, 5:9, 40:60] = 0.5
    images, labels = segmentation_data.augment(
        shape, shape[:, 0].bool().long(), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(labels.bool(), images[:, 0] > images[:, 0].mean((1, 2), keepdim=True) + 0.1)


def test_batches_are_in_a_new_order_and_the_same_for_the_same_pass() -> None:
    numbers = torch.arange(10.0).view(10, 1, 1, 1)
    batches = Batches(numbers, numbers.flatten(), lambda images, targets, _: (images, targets), 4)
    passes = [torch.cat([targets for _, targets in batches]) for _ in range(2)]
    assert len(batches) == 2
    assert len(passes[0]) == 8
    assert not torch.equal(*passes)
    batches.passes = 0
    assert torch.equal(torch.cat([targets for _, targets in batches]), passes[0])


def script(name: str) -> ModuleType:
    """Import a sample's train.py under a name of its own; it measures in torch alone, shortly."""
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / name / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.table_of = functools.partial(  # type: ignore[attr-defined]
        module.table_of, runtimes=("torch",), max_seconds=0.2
    )
    return module


def row(text: str, title: str) -> list[str]:
    (line,) = [own for own in text.splitlines() if own.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


SMALL = {
    "detection": lambda: FaceDetector((8, 8, 16, 16), 8),
    "segmentation": lambda: UNet(4, (8, 8, 16, 16)),
}


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pruning, int8 and distillation of one or four outputs in one run; its file gives what torch gives."""
    pytest.importorskip("skimage")
    module: Any = script(name)
    monkeypatch.setattr(
        module, {"detection": "FaceDetector", "segmentation": "UNet"}[name], lambda *arguments: SMALL[name]()
    )
    made: dict[str, Any] = {}
    measured = module.table_of
    monkeypatch.setattr(
        module,
        "table_of",
        lambda models, *rest, **more: made.update(models) or measured(models, *rest, **more),
    )
    readme = tmp_path / "README.md"
    readme.write_text((SAMPLES / name / "README.md").read_text())
    monkeypatch.setattr(module, "HERE", tmp_path)
    recipe = SAMPLES / name / "all_at_once.yaml"
    text = module.main(["--pictures", "48", "6", "--epochs", "4", "--recipe", str(recipe), "--readme"])
    assert text in readme.read_text()
    assert "| | float | all at once |" in text
    parameters = float(row(text, "parameters")[1].split("(")[1].rstrip("%)"))
    assert 25 < parameters < 60
    assert text.count("| simulated |") == 1
    images = torch.randn(2, 1 if name == "detection" else 3, 48, 32)
    result = dw.export(made["all at once"], tmp_path / "model.onnx", example_inputs=(images,))
    assert result.quantized
    assert result.parity_db is None or result.parity_db > 30
    expected = made["all at once"](images)
    outputs = onnxruntime.InferenceSession(result.path).run(None, {"images": images.numpy()})
    assert len(outputs) == {"detection": 4, "segmentation": 1}[name]
    for one, other in zip(outputs, expected.values() if name == "detection" else [expected], strict=True):
        torch.testing.assert_close(
            torch.from_numpy(one), other.detach(), rtol=0, atol=float(other.std().detach()) / 4
        )


@pytest.mark.parametrize("name", ["detection", "segmentation"])
@pytest.mark.parametrize("recipe", ["pruning", "int8"])
def test_the_other_recipes_fit_their_models(name: str, recipe: str) -> None:
    model = SMALL[name]()
    images = torch.randn(2, 1 if name == "detection" else 3, 32, 32)
    run = dw.from_recipe(
        model,
        SAMPLES / name / f"{recipe}.yaml",
        example_inputs=(images,),
        calibration_data=[images],
        steps_per_epoch=10,
        training_steps=10,
    )
    with run:
        assert len(run.compressors) == 1
