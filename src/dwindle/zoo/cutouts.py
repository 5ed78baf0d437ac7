"""Scenes: photographed things that the Debian package ``tuxpaint-stamps-default`` ships cut out, over photographs.

Animals, fruit, instruments, tools and vehicles, most of which are classes of ImageNet. There are no labels: scenes
serve as :mod:`dwindle.zoo.photographs` do, and there can be as many of them as anybody wants.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dwindle.zoo.datasets import import_or_explain
from dwindle.zoo.photographs import (
    as_bytes,
    check_part,
    normalized,
    not_installed,
    random_crop,
    read_photograph,
    resized,
)

__all__ = ["cutout_names", "read_cutout", "scenes"]

_PACKAGE = "tuxpaint-stamps-default"
_FOLDER = Path("/usr/share/tuxpaint/stamps")
_FOLDERS = (
    "animals",
    "food/fruit",
    "food/nuts",
    "food/vegetables",
    "hobbies",
    "household",
    "military/vehicles",
    "plants",
    "space/moon",
    "space/planets",
    "sports",
    "vehicles",
)
"""Folders of things; the others hold letters, signs, clothes and faces, most of them drawn."""

_DRAWN = re.compile(r"cartoon|_mirror|outline|rugby_goal_posts")
"""Drawings, and copies that are mirrored."""

_SMALLEST = 120
"""Longest side in pixels of the smallest cut-out that is taken."""

_SHARE = (0.5, 1.0)
"""The longest side of a thing as a share of the scene's."""


def cutout_names(part: Literal["calibration", "agreement", "all"] = "all") -> list[str]:
    """Return the names of cut-outs, in alphabetical order.

    Things of one first word (``bear_brown``, ``bear_grizzly``) belong to the same part.

    Args:
        part: Those to calibrate and train with, those to compare models on, or all.

    Raises:
        FileNotFoundError: The Debian package is not installed.
        ValueError: ``part`` is unknown.
    """
    check_part(part)
    if not _FOLDER.exists():
        raise not_installed(_FOLDER, _PACKAGE)
    image = import_or_explain("PIL.Image", "pillow")
    names = []
    for path in sorted(path for folder in _FOLDERS for path in (_FOLDER / folder).rglob("*.png")):
        name = str(path.relative_to(_FOLDER).with_suffix(""))
        if _DRAWN.search(name):
            continue
        with image.open(path) as picture:
            if max(picture.size) >= _SMALLEST:
                names.append(name)
    if part == "all":
        return names
    things = sorted({_thing(name) for name in names})
    return [name for name in names if things.index(_thing(name)) % 2 == (part == "agreement")]


def _thing(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{re.split(r'[_0-9-]', last.lower())[0]}"


@functools.lru_cache(maxsize=512)
def read_cutout(name: str) -> Tensor:
    """Read one cut-out.

    Args:
        name: One of :func:`cutout_names`.

    Returns:
        Shape ``(4, height, width)``, float32 between 0 and 1, at most 320 pixels long: red, green, blue, and how
        opaque it is. What is seen through wholly is left off.

    Raises:
        FileNotFoundError: There is no such cut-out.
    """
    image = import_or_explain("PIL.Image", "pillow")
    with image.open(_FOLDER / f"{name}.png") as picture:
        opened = picture.convert("RGBA")
        opened = opened.crop(opened.getchannel("A").getbbox())
        opened.thumbnail((320, 320))
        return torch.from_numpy(np.array(opened, np.float32) / 255.0).permute(2, 0, 1).contiguous()


def scenes(
    cutouts: Sequence[str],
    photographs: Sequence[str],
    count: int,
    *,
    size: int = 224,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    seed: int = 0,
) -> Tensor:
    """Paste cut-outs over crops of photographs.

    Every cut-out appears equally often (give or take one); its size (half to all of the scene's), its place, whether
    it is mirrored, and the crop behind it are random, and always the same ones for the same ``seed``.

    Args:
        cutouts: Out of :func:`cutout_names`.
        photographs: Names that :func:`dwindle.zoo.read_photograph` knows.
        count: Scenes.
        size: Height and width in pixels.
        mean: Mean of the channels, for values between 0 and 1.
        std: Standard deviation of the channels.
        seed: Decides everything random.

    Returns:
        Shape ``(count, 3, size, size)``, float32.

    Raises:
        FileNotFoundError: A Debian package is not installed.
        ValueError: There is no cut-out or no photograph, or ``count`` or ``size`` is below 1.
    """
    if not cutouts or not photographs or count < 1 or size < 1:
        raise ValueError(
            f"scenes take cut-outs, photographs, and a count and a size of at least 1; got {len(cutouts)} cut-outs, "
            f"{len(photographs)} photographs, count {count}, size {size}"
        )
    generator = torch.Generator().manual_seed(seed)
    behind = [read_photograph(name) for name in photographs]
    made: list[Tensor] = []
    while len(made) < count:
        for place in torch.randperm(len(cutouts), generator=generator).tolist()[: count - len(made)]:
            own, crop = torch.randint(0, 2**31, (2,), generator=generator).tolist()
            photograph = behind[own % len(behind)]
            made.append(_pasted(read_cutout(cutouts[place]), random_crop(photograph, size, crop), own))
    return normalized(made, mean, std)


def _pasted(cutout: Tensor, background: Tensor, seed: int) -> Tensor:
    """Return the background with the cut-out somewhere on it."""
    generator = torch.Generator().manual_seed(seed)
    share, top_share, left_share, mirror = torch.rand(4, generator=generator).tolist()
    size = background.shape[-1]
    longest = size * (_SHARE[0] + (_SHARE[1] - _SHARE[0]) * share)
    scale = longest / max(cutout.shape[1:])
    height, width = (min(size, max(1, round(own * scale))) for own in cutout.shape[1:])
    # colours are weighted by how opaque they are, or the colour of what is seen through would shine at the edges
    opaque = resized(cutout[3:], height, width)
    colours = resized(cutout[:3] * cutout[3:], height, width)
    if mirror < 0.5:
        opaque, colours = opaque.flip(-1), colours.flip(-1)
    top, left = int(top_share * (size - height + 1)), int(left_share * (size - width + 1))
    scene = background.clone()
    under = scene[:, top : top + height, left : left + width]
    under.copy_(as_bytes(colours + under * (1 - opaque)))
    return scene
