"""Shapes to segment: discs, triangles and rings over real photographs of scikit-image and scikit-learn.

A shape is filled with a piece of another photograph in a tint and contrast of its own, so neither colour nor texture
tells what it is; shapes turn, stretch, and cover each other. The left two thirds of every photograph are for training,
the right third is for the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dwindle.zoo import read_photograph

CLASSES = ("photograph", "disc", "triangle", "ring")

PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "china", "clock", "coffee", "coins", "flower",
    "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "motorcycle", "page",
    "retina", "rocket", "text",
)  # fmt: skip

TRAINING_SHARE = 0.66
"""The left part of each photograph is for training, the rest of it for the test."""

SIZE = 64
MOST_SHAPES = 3
SQUARES = 1000
"""So many squares are cut out of the photographs; pictures and shapes are filled with them."""

Field = np.ndarray
"""For each pixel how far it is within a shape, in units of the shape's radius; negative outside. ``(64, 64)``."""


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is where in them.

    Attributes:
        images: Shape ``(n, 3, 64, 64)``, float32 between -1 and 1.
        labels: Shape ``(n, 64, 64)``, int64: positions in :data:`CLASSES`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def scenes(part: str, count: int, seed: int = 0) -> Scenes:
    """Make ``count`` pictures of a part, ``train`` or ``test``; the same ones for the same seed.

    Raises:
        ImportError: scikit-image or scikit-learn is missing.
    """
    generator = np.random.default_rng([seed, part == "test"])
    photographs = [_part_of(read_photograph(name), part) for name in PHOTOGRAPHS]
    squares = [_square(generator, photographs) for _ in range(min(SQUARES, 2 * count))]
    made = [_scene(generator, squares) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in made]))
    return Scenes(images.mul(2).sub(1), torch.from_numpy(np.stack([labels for _, labels in made])))


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror pictures to the side and upside down, half of them each, and change the brightness of all."""
    for axis in (-1, -2):
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(axis), images)
        labels = torch.where(mirrored.view(-1, 1, 1), labels.flip(axis), labels)
    brightness = 0.3 * torch.rand(len(images), 1, 1, 1, generator=generator) - 0.15
    return (images + brightness).clamp(-1, 1), labels


def _disc(x: Field, y: Field) -> Field:
    return 1 - np.hypot(x, y)


def _triangle(x: Field, y: Field) -> Field:
    return 0.55 - np.maximum(np.maximum(0.87 * x - 0.5 * y, -0.87 * x - 0.5 * y), y)


def _ring(x: Field, y: Field) -> Field:
    return 0.25 - np.abs(np.hypot(x, y) - 0.75)


SHAPES: tuple[Callable[[Field, Field], Field], ...] = (_disc, _triangle, _ring)
"""Of the classes from 1 on."""


def _scene(generator: np.random.Generator, squares: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    image = _filling(generator, squares)
    labels = np.zeros((SIZE, SIZE), dtype=np.int64)
    for _ in range(generator.integers(1, MOST_SHAPES + 1)):
        kind = int(generator.integers(len(SHAPES)))
        within = _draw(generator, SHAPES[kind])
        tint = generator.uniform(-0.5, 0.5, (3, 1, 1))
        filling = (_filling(generator, squares) - 0.5) * generator.uniform(0.1, 0.5) + 0.5 + tint
        image += np.clip(within + 0.5, 0, 1) * (np.clip(filling, 0, 1) - image)
        labels[within > 0] = kind + 1
    image += generator.normal(0, 0.03 * generator.random(), image.shape)
    return np.clip(image, 0, 1).astype(np.float32), labels


def _draw(generator: np.random.Generator, shape: Callable[[Field, Field], Field]) -> Field:
    """A shape somewhere: for each pixel how many pixels it is within."""
    radius, stretch = generator.uniform(10, 22), generator.uniform(0.85, 1.0)
    centre = generator.uniform(0.2 * SIZE, 0.8 * SIZE, 2)
    angle = generator.uniform(0, 2 * np.pi)
    pixels = np.arange(SIZE) + 0.5
    x, y = np.meshgrid(pixels - centre[0], pixels - centre[1])
    turned_x = (np.cos(angle) * x + np.sin(angle) * y) / radius
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) / (radius * stretch)
    return shape(turned_x, turned_y) * radius * stretch


def _filling(generator: np.random.Generator, squares: list[np.ndarray]) -> np.ndarray:
    """A copy of one of the squares, perhaps mirrored."""
    square = squares[generator.integers(len(squares))]
    return square[:, :: generator.choice((-1, 1)), :: generator.choice((-1, 1))].copy()


def _part_of(photograph: Tensor, part: str) -> Tensor:
    seam = int(photograph.shape[-1] * TRAINING_SHARE)
    return photograph[..., :seam] if part == "train" else photograph[..., seam:]


def _square(generator: np.random.Generator, photographs: list[Tensor]) -> np.ndarray:
    """A random square of a random photograph, 48 to 128 pixels, as ``(3, 64, 64)``."""
    photograph = photographs[generator.integers(len(photographs))]
    height, width = photograph.shape[1:]
    side = min(int(generator.integers(48, 129)), height, width)
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    square = photograph[None, :, top : top + side, left : left + side]
    return (
        functional.interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)[0].clamp(0, 1).numpy()
    )
