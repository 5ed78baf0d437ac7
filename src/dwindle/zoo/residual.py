"""A small residual network for small images, wide or deep as wanted.

The plan follows He et al., "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385,
section 4.2): a stem convolution, stages of two-convolution blocks that halve the resolution and raise the
width, global average pooling and one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ResidualBlock", "ResidualNetwork", "digits_resnet", "fashion_resnet", "residual_network"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a way around them.

    The way around is the input itself where the shape allows it, else a strided 1x1 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution, and of the way around.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shape ``(batch, out_channels, height / stride, width / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """A residual image classifier. See :func:`residual_network` for the arguments."""

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        in_channels: int = 1,
        classes: int = 10,
        stem_stride: int = 1,
    ):
        super().__init__()
        if not widths or len(widths) != len(depths):
            raise ValueError(f"widths and depths must be equally long, got {list(widths)} and {list(depths)}")
        if min(widths) < 1 or min(depths) < 1:
            raise ValueError(f"widths and depths must be positive, got {list(widths)} and {list(depths)}")
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for block in range(depth):
                blocks.append(ResidualBlock(channels, width, stride=2 if index > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch of images.

        Args:
            x: Images, shape ``(batch, in_channels, height, width)``, floating.

        Returns:
            Logits, shape ``(batch, classes)``.
        """
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.pool(self.stages(x))
        return self.head(torch.flatten(x, 1))


def residual_network(
    widths: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] = (1, 1, 1),
    *,
    in_channels: int = 1,
    classes: int = 10,
    stem_stride: int = 1,
) -> ResidualNetwork:
    """Build a residual network with random weights (``torch.manual_seed`` decides them).

    ``depths=(1, 1, 1)`` is ResNet-8 and ``(3, 3, 3)`` is ResNet-20 in the counting of the paper.

    Args:
        widths: Channels of each stage.
        depths: Residual blocks of each stage; every stage but the first halves height and width.
        in_channels: Channels of the images.
        classes: How many classes.
        stem_stride: Stride of the first convolution; 2 makes everything behind it four times cheaper.

    Raises:
        ValueError: ``widths`` and ``depths`` differ in length or hold a number below 1.
    """
    return ResidualNetwork(widths, depths, in_channels=in_channels, classes=classes, stem_stride=stem_stride)


def digits_resnet(
    widths: Sequence[int] = (32, 64, 128), depths: Sequence[int] = (1, 1, 1)
) -> ResidualNetwork:
    """The network of the demo: ResNet-8 for scikit-learn's 8x8 grey digits, 309 thousand parameters."""
    return residual_network(widths, depths)


def fashion_resnet(
    widths: Sequence[int] = (32, 64, 128), depths: Sequence[int] = (1, 1, 1), stem_stride: int = 2
) -> ResidualNetwork:
    """The network of the Fashion-MNIST recipe: ResNet-8 for 28x28 grey images behind a strided stem."""
    return residual_network(widths, depths, stem_stride=stem_stride)
