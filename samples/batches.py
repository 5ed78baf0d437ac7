"""Pictures in memory with what is to be said of them, in augmented batches of a new order in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class Batches:
    """Iterates over pictures; what is left of the last batch is left out.

    Attributes:
        images: Shape ``(n, channels, height, width)``.
        targets: What belongs to each: boxes, maps of classes; shape ``(n, ...)``.
        augment: ``augment(images, targets, generator)``, for each batch.
        batch_size: Pictures of a batch.
        passes: Passes so far; they decide order and augmentation.
    """

    images: Tensor
    targets: Tensor
    augment: Augment
    batch_size: int = 16
    passes: int = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.passes)
        self.passes += 1
        order = torch.randperm(len(self.images), generator=generator)
        for chosen in order.split(self.batch_size)[: len(self)]:
            images, targets = self.augment(self.images[chosen], self.targets[chosen], generator)
            # Convolutions on a processor are faster with the channels last.
            yield images.contiguous(memory_format=torch.channels_last), targets
