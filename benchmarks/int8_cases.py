"""What ``benchmarks/int8.py`` compares: models with what calibrates and what judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwindle import zoo


def arrays(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return a batch as arrays."""
    return {name: value.numpy() for name, value in batch.items()}


def in_torch(model: nn.Module) -> Callable[[dict[str, np.ndarray]], Any]:
    """Return what runs a model on arrays by name."""

    def run(batch: dict[str, np.ndarray]) -> Any:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in batch.items()}).numpy()

    return run


@dataclass
class Case:
    """One model with its data.

    Attributes:
        model: The float model.
        calibration: Batches, as arguments by name.
        test: Batches to judge on.
        output: From the output of a batch and the batch to what is judged.
        options: What ``dw.quantize`` is told besides.
        transformer: Whether NNCF is told so.
        answer: From what is judged to one answer for each sample: the largest output, unless said otherwise.
        classify: From what is judged to a class for each sample, where the model itself has no classes.
    """

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    output: Callable[[np.ndarray, dict[str, Tensor]], np.ndarray] = lambda output, batch: output
    options: dict[str, Any] = field(default_factory=dict)
    transformer: bool = False
    answer: Callable[[np.ndarray], np.ndarray] = lambda judged: judged.argmax(-1)
    classify: Callable[[np.ndarray], np.ndarray] | None = None


class Images(nn.Module):
    """A model of images with a named input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(images)
        return logits


class Hidden(nn.Module):
    """A text encoder that gives its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden state of each token."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def _image_case(model: nn.Module, mean: Any, std: Any, crops: tuple[int, int]) -> Case:
    parts = (("calibration", crops[0]), ("agreement", crops[1]))
    calibration, test = (
        [
            {"images": batch}
            for batch in zoo.photographs(part, crops=count, mean=mean, std=std).split(16)  # type: ignore[arg-type]
        ]
        for part, count in parts
    )
    return Case(Images(model).eval(), calibration, test)


def _stand_in(build: Callable[[], nn.Module], seed: int = 0) -> Case:
    """A model with random weights whose normalizations have seen photographs."""
    torch.manual_seed(seed)
    model = build()
    case = _image_case(model, zoo.IMAGENET_MEAN, zoo.IMAGENET_STD, (4, 4))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in case.calibration:
            model(batch["images"])
    model.eval()
    return case


def _efficientnet_lite0() -> Case:
    return _image_case(zoo.efficientnet_lite0_timm(), (0.5,) * 3, (0.5,) * 3, (8, 24))


def _minilm(length: int = 64) -> Case:
    model, tokenizer = zoo.minilm()
    sentences = zoo.movie_reviews("sentences")
    texts = [text for text, _ in sentences]

    def batches(begin: int, end: int) -> list[dict[str, Tensor]]:
        found = []
        for start in range(begin, end, 16):
            tokens = tokenizer(
                texts[start : start + 16],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            found.append({name: tokens[name] for name in ("input_ids", "attention_mask")})
        return found

    def pooled(output: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        weight = batch["attention_mask"].numpy()[..., None].astype(np.float64)
        embedding: np.ndarray = (output * weight).sum(1) / weight.sum(1)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

    encoder = Hidden(model).eval()
    run = in_torch(encoder)
    known = np.concatenate([pooled(run(arrays(batch)), batch) for batch in batches(2000, 4048)])
    stored, direction = known[:1024], _praise(known, [label for _, label in sentences[2000:4048]])
    return Case(
        encoder,
        batches(0, 384),
        batches(1000, 1992),
        pooled,
        {"preset": "int8_transformer"},
        transformer=True,
        answer=lambda judged: (judged @ stored.T).argmax(-1),  # the nearest of 1,024 stored sentences
        classify=lambda judged: judged @ direction[:-1] + direction[-1] > 0,
    )


def _praise(embeddings: np.ndarray, labels: list[int]) -> np.ndarray:
    """Return the direction, and behind it the offset, that tells praise from blame: ridge regression."""
    known = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1)
    goals = 2.0 * np.asarray(labels) - 1.0
    direction: np.ndarray = np.linalg.solve(known.T @ known + np.eye(known.shape[1]), known.T @ goals)
    return direction


def _torchvision(name: str) -> Case:
    import torchvision

    return _stand_in(lambda: torchvision.models.get_model(name, weights=None))


def _timm(name: str, seed: int = 0) -> Case:
    import timm

    return _stand_in(lambda: timm.create_model(name, pretrained=False), seed)


CASES: dict[str, Callable[[], Case]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "minilm": _minilm,
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2"),
    "mobilenetv3_small_050": partial(_timm, "mobilenetv3_small_050"),
    **{
        f"mobilenetv3_small_050_seed_{seed}": partial(_timm, "mobilenetv3_small_050", seed)
        for seed in range(1, 5)
    },
}
"""What is compared; the seeds are further stand-ins of one architecture, of which the page shows the mean."""
