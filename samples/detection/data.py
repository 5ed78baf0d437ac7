"""Faces to find: real ones of scikit-image's ``lfw_subset``, blended into real photographs.

Every picture is grey, with up to four faces between 14 and 40 pixels, and with patches that are blended in the same
way and are no faces: pieces of other photographs, and faces whose four quarters changed places. So neither the seam
nor skin tells a face. The faces and photographs of the test are never seen in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dwindle.zoo import read_photograph

PHOTOGRAPHS = {
    "train": (
        "brick",
        "chelsea",
        "clock",
        "coffee",
        "grass",
        "hubble_deep_field",
        "motorcycle",
        "rocket",
        "immunohistochemistry",
    ),
    "test": ("flower", "china", "gravel", "moon", "retina", "text"),
}
"""Photographs without people; no photograph serves both."""

TRAIN_FACES = 70
"""Of the 100 faces; the other 30 are for the test."""

SIZE = 96
SMALLEST, LARGEST = 14.0, 40.0
MOST_FACES = 4
LONGEST_SIDE = 512
"""Photographs are made so small at first: cutting a square out of larger ones would only take time."""


@dataclass(frozen=True)
class Scenes:
    """Pictures and the faces in them.

    Attributes:
        images: Shape ``(n, 1, 96, 96)``, float32 between -1 and 1.
        boxes: Shape ``(n, 4 faces, 4)``: left, top, right, bottom in pixels; NaN where there are fewer faces.
    """

    images: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)


def scenes(part: str, count: int, seed: int = 0) -> Scenes:
    """Make ``count`` pictures of a part, ``train`` or ``test``; the same ones for the same seed.

    Raises:
        ImportError: scikit-image or scikit-learn is missing.
    """
    generator = np.random.default_rng([seed, part == "test"])
    faces = _faces(part)
    photographs = [_smaller(read_photograph(name).mean(0)) for name in PHOTOGRAPHS[part]]
    made = [_scene(generator, faces, photographs, morph=part == "train") for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in made]))
    return Scenes(images.unsqueeze(1).mul(2).sub(1), torch.from_numpy(np.stack([boxes for _, boxes in made])))


def augment(images: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the pictures, and change brightness and contrast of all."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    turned = torch.stack([SIZE - boxes[..., 2], boxes[..., 1], SIZE - boxes[..., 0], boxes[..., 3]], -1)
    boxes = torch.where(mirrored.view(-1, 1, 1), turned, boxes)
    contrast = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
    brightness = 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator) - 0.2
    return (images * contrast + brightness).clamp(-1, 1), boxes


def _faces(part: str) -> np.ndarray:
    """The faces of a part, shape ``(n, 25, 25)``, values between 0 and 1."""
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise ImportError("the faces come with scikit-image: pip install scikit-image") from error
    faces = lfw_subset()[:100].astype(np.float32)
    return faces[:TRAIN_FACES] if part == "train" else faces[TRAIN_FACES:]


def _scene(
    generator: np.random.Generator, faces: np.ndarray, photographs: list[np.ndarray], morph: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One picture, and the boxes of its faces."""
    image = _crop(generator, photographs, SIZE, smallest=0.3)
    taken: list[tuple[float, float, float]] = []
    boxes = np.full((MOST_FACES, 4), np.nan, dtype=np.float32)
    for index in range(generator.integers(0, MOST_FACES + 1)):
        place = _place(generator, taken)
        if place is not None:
            _blend(generator, image, _face(generator, faces, morph), place)
            left, top, size = place
            boxes[index] = (left, top, left + size, top + size)
    for _ in range(generator.integers(0, 4)):
        place = _place(generator, taken)
        if place is not None:
            _blend(generator, image, _distractor(generator, faces, photographs), place)
    noise = generator.normal(0, 0.02 * generator.random(), image.shape)
    return np.clip(image + noise, 0, 1).astype(np.float32), boxes


def _face(generator: np.random.Generator, faces: np.ndarray, morph: bool) -> np.ndarray:
    """One face, mirrored or not; with ``morph`` half of the time something between two faces."""
    face = faces[generator.integers(len(faces))][:, :: generator.choice((-1, 1))]
    if morph and generator.random() < 0.5:
        other = faces[generator.integers(len(faces))][:, :: generator.choice((-1, 1))]
        face = face + generator.uniform(0, 0.5) * (other - face)
    return face


def _distractor(
    generator: np.random.Generator, faces: np.ndarray, photographs: list[np.ndarray]
) -> np.ndarray:
    if generator.random() < 0.5:
        return _crop(generator, photographs, 25, smallest=0.1)
    face = faces[generator.integers(len(faces))]
    return np.roll(face, (12, 12), axis=(0, 1))  # the quarters change places


def _place(
    generator: np.random.Generator, taken: list[tuple[float, float, float]]
) -> tuple[float, float, float] | None:
    """A free square (left, top, size); None when none is found in ten tries. It counts as taken from then on."""
    for _ in range(10):
        size = float(np.exp(generator.uniform(np.log(SMALLEST), np.log(LARGEST))))
        left, top = generator.uniform(0, SIZE - size, 2)
        if all(
            left + size < x or x + other < left or top + size < y or y + other < top for x, y, other in taken
        ):
            taken.append((left, top, size))
            return left, top, size
    return None


def _blend(
    generator: np.random.Generator, image: np.ndarray, patch: np.ndarray, place: tuple[float, float, float]
) -> None:
    """Draw a patch into the picture, softly within an ellipse, in a light of its own."""
    left, top, size = place
    first_x, first_y = int(left), int(top)
    last_x, last_y = min(int(np.ceil(left + size)), SIZE), min(int(np.ceil(top + size)), SIZE)
    # Where in the patch each pixel looks, from -1 to 1, turned a little.
    x = (np.arange(first_x, last_x) + 0.5 - left) / size * 2 - 1
    y = (np.arange(first_y, last_y) + 0.5 - top) / size * 2 - 1
    x, y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    angle = generator.normal(0, 0.12)
    grid = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], -1)
    source = torch.from_numpy(np.ascontiguousarray(patch, dtype=np.float32))[None, None]
    # A patch that becomes smaller is made so before, else every second pixel of it would be lost.
    small = max(min(round(size), patch.shape[0]), 4)
    source = functional.interpolate(source, (small, small), mode="bilinear", antialias=True)
    look = torch.from_numpy(grid.astype(np.float32))[None]
    drawn = functional.grid_sample(source, look, padding_mode="border", align_corners=False)[0, 0].numpy()
    drawn = np.clip((drawn - 0.5) * generator.uniform(0.7, 1.3) + 0.5 + generator.uniform(-0.15, 0.15), 0, 1)
    softness = generator.uniform(0.05, 0.25)
    share = np.clip((1.0 - np.sqrt((x / 0.95) ** 2 + y**2)) / softness, 0, 1)
    part = image[first_y:last_y, first_x:last_x]
    part += share * (drawn - part)


def _crop(
    generator: np.random.Generator, photographs: list[np.ndarray], size: int, smallest: float
) -> np.ndarray:
    """A random square of a random photograph, at least ``smallest`` of its short side, as ``(size, size)``."""
    photograph = photographs[generator.integers(len(photographs))]
    height, width = photograph.shape
    side = max(int(min(height, width) * generator.uniform(smallest, 1.0)), size // 2)
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    square = torch.from_numpy(photograph[top : top + side, left : left + side])[None, None]
    return _resized(square, size, size)[0, 0].numpy().copy()


def _smaller(photograph: Tensor) -> np.ndarray:
    height, width = photograph.shape
    share = min(LONGEST_SIDE / max(height, width), 1.0)
    return _resized(photograph[None, None], round(height * share), round(width * share))[0, 0].numpy()


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
