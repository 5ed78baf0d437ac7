"""A small single-shot detector: a residual backbone, a feature pyramid of two levels, one head for both.

After Lin et al., "Feature Pyramid Networks for Object Detection" (https://arxiv.org/abs/1612.03144), and Tian et al.,
"FCOS: Fully Convolutional One-Stage Object Detection" (https://arxiv.org/abs/1904.01355): no anchors, each place of a
level says whether it is in the middle of a face, and how far the four sides of the face are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDES = {"fine": 4, "coarse": 8}
"""Pixels between neighbouring places of a level."""

REACH = {"fine": 16.0, "coarse": 32.0}
"""Unit in which a level says distances, in pixels."""


class Block(nn.Module):
    """Two 3x3 convolutions with a way around them."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return half the resolution."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut_bn(self.shortcut(x)))


class Head(nn.Module):
    """What both levels share: features of its own, a score and four distances for each place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.score = nn.Conv2d(channels, 1, 1)
        self.sides = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.score.bias, -4.0)  # nearly every place is background (Focal Loss, section 4.1)
        nn.init.constant_(self.sides.bias, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (logits) and distances."""
        x = self.relu(self.bn(self.conv(x)))
        return self.score(x), self.sides(x)


class FaceDetector(nn.Module):
    """Finds faces of 14 to 40 pixels.

    Args:
        widths: Channels of the stem and of the three stages.
        pyramid: Channels of the pyramid and the head.
    """

    def __init__(self, widths: Sequence[int] = (16, 24, 48, 64), pyramid: int = 24):
        super().__init__()
        stem, *stages = widths
        self.stem = nn.Sequential(
            nn.Conv2d(1, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.stage1 = Block(stem, stages[0])
        self.stage2 = Block(stages[0], stages[1])
        self.stage3 = Block(stages[1], stages[2])
        self.lateral1 = nn.Conv2d(stages[0], pyramid, 1)
        self.lateral2 = nn.Conv2d(stages[1], pyramid, 1)
        self.lateral3 = nn.Conv2d(stages[2], pyramid, 1)
        self.head = Head(pyramid)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Look at pictures.

        Args:
            images: Shape ``(batch, 1, height, width)``, sides divisible by 16.

        Returns:
            For both levels ``<level>_scores``, logits of shape ``(batch, 1, height / stride, width / stride)``, and
            ``<level>_sides``: the distances to the left, upper, right and lower side, shape ``(batch, 4, ...)``.
        """
        half = self.stage1(self.stem(images))
        quarter = self.stage2(half)
        eighth = self.stage3(quarter)
        coarse = self.lateral2(quarter) + functional.interpolate(self.lateral3(eighth), scale_factor=2)
        fine = self.lateral1(half) + functional.interpolate(coarse, scale_factor=2)
        fine_scores, fine_sides = self.head(fine)
        coarse_scores, coarse_sides = self.head(coarse)
        return {
            "fine_scores": fine_scores,
            "fine_sides": fine_sides,
            "coarse_scores": coarse_scores,
            "coarse_sides": coarse_sides,
        }


def places(level: str, height: int, width: int) -> Tensor:
    """Return the pixel that each place of a level stands for: shape ``(2, height, width)``, x and y."""
    stride = STRIDES[level]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([x, y]) + 0.5) * stride
