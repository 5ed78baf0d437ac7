"""A small U-Net: down to a sixteenth of the resolution and up again to half of it, with ways across.

After Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation"
(https://arxiv.org/abs/1505.04597), with strided convolutions down, bilinear steps up, and batch normalization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with its normalization and activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Down(nn.Module):
    """Half the resolution, and a residual convolution there."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.reduce = convolution(in_channels, out_channels, stride=2)
        self.refine = convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of half the height and width."""
        x = self.reduce(x)
        return x + self.refine(x)


class Up(nn.Module):
    """Twice the resolution, joined with what was there on the way down."""

    def __init__(self, in_channels: int, across: int, out_channels: int):
        super().__init__()
        self.join = convolution(in_channels + across, out_channels)

    def forward(self, x: Tensor, across: Tensor) -> Tensor:
        """Return features of the size of ``across``."""
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.join(torch.cat([x, across], dim=1))


class UNet(nn.Module):
    """Says for each pixel what it belongs to.

    Args:
        classes: How many classes.
        widths: Channels at a half, a quarter, an eighth and a sixteenth of the resolution.
    """

    def __init__(self, classes: int = 4, widths: Sequence[int] = (16, 32, 48, 64)):
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.stem = convolution(3, half, stride=2)
        self.down1 = Down(half, quarter)
        self.down2 = Down(quarter, eighth)
        self.down3 = Down(eighth, sixteenth)
        self.up3 = Up(sixteenth, eighth, eighth)
        self.up2 = Up(eighth, quarter, quarter)
        self.up1 = Up(quarter, half, half)
        self.classify = nn.Conv2d(half, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``(batch, classes, height, width)`` for pictures with sides divisible by 16."""
        half = self.stem(images)
        quarter = self.down1(half)
        eighth = self.down2(quarter)
        x = self.down3(eighth)
        x = self.up3(x, eighth)
        x = self.up2(x, quarter)
        x = self.up1(x, half)
        return functional.interpolate(self.classify(x), scale_factor=2, mode="bilinear", align_corners=False)
