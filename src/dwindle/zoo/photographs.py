"""Real photographs that scikit-image, scikit-learn and two Debian packages ship, made ready for ImageNet models.

There are no labels: the photographs serve to calibrate a quantizer and to count how often a small model says
the same as the original one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dwindle.zoo.datasets import import_or_explain

__all__ = [
    "DEBIAN_PHOTOGRAPHS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PHOTOGRAPHS",
    "photograph_sets",
    "photographs",
    "read_photograph",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PHOTOGRAPHS: dict[str, str] = {
    "astronaut": "agreement",
    "brick": "calibration",
    "camera": "agreement",
    "chelsea": "agreement",
    "china": "calibration",
    "clock": "calibration",
    "coffee": "agreement",
    "coins": "calibration",
    "flower": "agreement",
    "grass": "agreement",
    "gravel": "calibration",
    "hubble_deep_field": "calibration",
    "immunohistochemistry": "calibration",
    "moon": "agreement",
    "motorcycle": "calibration",
    "page": "calibration",
    "retina": "agreement",
    "rocket": "calibration",
    "text": "agreement",
}
"""Every photograph and the part it belongs to; no photograph serves both."""

DEBIAN_FOLDERS: dict[str, Path] = {
    "opencv-doc": Path("/usr/share/doc/opencv-doc/examples/data"),
    "mate-backgrounds": Path("/usr/share/backgrounds/mate/nature"),
}
"""Where the two packages put their pictures."""

_DEBIAN_FILES: dict[str, str] = {
    "opencv-doc": "aero1.jpg aloeL.jpg apple.jpg baboon.jpg basketball1.png board.jpg box_in_scene.png building.jpg "
    "butterfly.jpg chicky_512.png ela_original.jpg fruits.jpg graf1.png home.jpg left01.jpg leuvenA.jpg "
    "licenseplate_motion.jpg messi5.jpg orange.jpg rubberwhale1.png smarties.png squirrel_cls.jpg stuff.jpg sudoku.png",
    "mate-backgrounds": "Aqua.jpg Blinds.jpg Dune.jpg FreshFlower.jpg Garden.jpg GreenMeadow.jpg LadyBird.jpg "
    "RainDrops.jpg Storm.jpg TwoWings.jpg Wood.jpg YellowFlower.jpg",
}

DEBIAN_PHOTOGRAPHS: dict[str, str] = {
    f"{package}/{name}": ("calibration", "agreement")[number % 2]
    for package, names in _DEBIAN_FILES.items()
    for number, name in enumerate(names.split())
}
"""Photographs of the Debian packages ``opencv-doc`` and ``mate-backgrounds`` (no two of one scene), and their parts."""

_SMALLEST_CROP = 0.35
"""Smallest area of a crop as a share of the photograph."""


def read_photograph(name: str) -> Tensor:
    """Read one photograph.

    Args:
        name: A key of :data:`PHOTOGRAPHS` or :data:`DEBIAN_PHOTOGRAPHS`.

    Returns:
        Shape ``(3, height, width)``, float32 between 0 and 1; grey pictures have three equal channels.

    Raises:
        KeyError: There is no photograph of that name.
        FileNotFoundError: The Debian package is not installed.
        ImportError: scikit-image or scikit-learn is not installed.
    """
    if name not in PHOTOGRAPHS and name not in DEBIAN_PHOTOGRAPHS:
        raise KeyError(f"no photograph {name!r}; there are {', '.join([*PHOTOGRAPHS, *DEBIAN_PHOTOGRAPHS])}")
    if name in DEBIAN_PHOTOGRAPHS:
        pixels = _read_file(*name.split("/"))
    elif name in ("china", "flower"):
        import_or_explain("sklearn", "scikit-learn")
        from sklearn.datasets import load_sample_image

        pixels = np.asarray(load_sample_image(f"{name}.jpg"))
    else:
        data = import_or_explain("skimage.data", "scikit-image")
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(pixels[..., :3].astype(np.float32) / 255.0).permute(2, 0, 1).contiguous()


def _read_file(package: str, name: str) -> np.ndarray:
    path = DEBIAN_FOLDERS[package] / name
    if not path.exists():
        raise not_installed(path, package)
    image = import_or_explain("PIL.Image", "pillow")
    with image.open(path) as picture:
        picture.thumbnail((1024, 1024))  # some are wallpapers
        return np.asarray(picture.convert("RGB"))


def not_installed(path: Path, package: str) -> FileNotFoundError:
    """Return the error that says which Debian package has a path."""
    return FileNotFoundError(
        f"{path} is not there. On Debian and Ubuntu: sudo apt-get update && sudo apt-get install {package}"
    )


def check_part(part: str) -> None:
    """Refuse a part that there is not.

    Raises:
        ValueError: It is unknown.
    """
    if part not in ("calibration", "agreement", "all"):
        raise ValueError(f"part must be 'calibration', 'agreement' or 'all', got {part!r}")


def photographs(
    part: Literal["calibration", "agreement", "all"] = "all",
    *,
    crops: int = 8,
    size: int = 224,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    seed: int = 0,
    debian: bool = False,
) -> Tensor:
    """Cut crops out of the photographs, as bytes, and normalise them.

    The first crop of each photograph is its centre (short side to ``size / 0.875``, as ImageNet models are
    tested); the others have a random place and size and are mirrored half of the time, always the same ones
    for the same ``seed``.

    Args:
        part: Which photographs: those to calibrate with, those to compare models on, or all.
        crops: Crops of each photograph.
        size: Height and width of a crop in pixels.
        mean: Mean of the channels, for values between 0 and 1. The defaults are those of EfficientNet-Lite;
            most other models want :data:`IMAGENET_MEAN` and :data:`IMAGENET_STD`.
        std: Standard deviation of the channels.
        seed: Decides the random crops.
        debian: Add :data:`DEBIAN_PHOTOGRAPHS`, behind the others.

    Returns:
        Shape ``(photographs * crops, 3, size, size)``, float32; the crops of a photograph lie together.

    Raises:
        FileNotFoundError: A Debian package is not installed.
        ValueError: ``part`` is unknown, or ``crops`` or ``size`` is below 1.
    """
    check_part(part)
    if crops < 1 or size < 1:
        raise ValueError(f"crops and size must be at least 1, got {crops} and {size}")
    generator = torch.Generator().manual_seed(seed)
    cut: list[Tensor] = []
    for name, belongs in {**PHOTOGRAPHS, **(DEBIAN_PHOTOGRAPHS if debian else {})}.items():
        # The generator moves on for every photograph, so the parts together are the same as "all".
        seeds = torch.randint(0, 2**31, (crops,), generator=generator)
        if part not in ("all", belongs):
            continue
        picture = read_photograph(name)
        cut.append(_centre_crop(picture, size))
        cut.extend(random_crop(picture, size, int(one)) for one in seeds[1:])
    return normalized(cut, mean, std)


def photograph_sets(
    crops: int = 8,
    size: int = 224,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> dict[str, Tensor]:
    """Both parts of :func:`photographs`, for recipes: ``calibration``, and ``test`` to compare models on.

    Args:
        crops: Crops of each photograph.
        size: Height and width of a crop in pixels.
        mean: Mean of the channels, for values between 0 and 1.
        std: Standard deviation of the channels.
    """
    return {
        "calibration": photographs("calibration", crops=crops, size=size, mean=mean, std=std),
        "test": photographs("agreement", crops=crops, size=size, mean=mean, std=std),
    }


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """Return a picture, ``(channels, height, width)`` between 0 and 1, in another size."""
    found = torch.nn.functional.interpolate(
        picture.unsqueeze(0), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return as_bytes(found[0])  # a resized picture is bytes again


def as_bytes(picture: Tensor) -> Tensor:
    """Return values between 0 and 1 that a picture in bytes can have."""
    return picture.clamp(0.0, 1.0).mul(255.0).round().div(255.0)


def normalized(pictures: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pictures, each ``(3, height, width)`` between 0 and 1, as one normalised batch."""
    shape = (1, 3, 1, 1)
    return (torch.stack(list(pictures)) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _centre_crop(picture: Tensor, size: int) -> Tensor:
    height, width = picture.shape[1:]
    scale = round(size / 0.875) / min(height, width)
    whole = resized(picture, max(round(height * scale), size), max(round(width * scale), size))
    top, left = (whole.shape[1] - size) // 2, (whole.shape[2] - size) // 2
    return whole[:, top : top + size, left : left + size]


def random_crop(picture: Tensor, size: int, seed: int) -> Tensor:
    """Return a square of random size and place, mirrored half of the time, resized to ``(3, size, size)``."""
    generator = torch.Generator().manual_seed(seed)
    area, top_share, left_share, mirror = torch.rand(4, generator=generator).tolist()
    height, width = picture.shape[1:]
    side = int(min(height, width) * (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * area) ** 0.5)
    top, left = int(top_share * (height - side + 1)), int(left_share * (width - side + 1))
    crop = resized(picture[:, top : top + side, left : left + side], size, size)
    return crop.flip(-1) if mirror < 0.5 else crop
