"""Small real data that packages ship, as tensors, and a loader for tensors in memory.

Nothing here is downloaded: the digits come with scikit-learn, Fashion-MNIST with Debian's package
``dataset-fashion-mnist``, the photographs with scikit-image and scikit-learn.
"""

from __future__ import annotations

import gzip
import importlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BatchLoader",
    "DatasetNotFoundError",
    "ImageData",
    "digits",
    "fashion_mnist",
    "random_flip",
    "random_shift",
]

FASHION_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts Fashion-MNIST; the variable ``FASHION_MNIST_DIR`` names another place."""

FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_FASHION_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


class DatasetNotFoundError(FileNotFoundError):
    """The data are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images, split for training and testing.

    Attributes:
        train_images: Shape ``(n, channels, height, width)``, float32.
        train_labels: Shape ``(n,)``, int64.
        test_images: Like ``train_images``.
        test_labels: Like ``train_labels``.
        class_names: What the labels mean.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    def first(self, train: int, test: int | None = None) -> ImageData:
        """Return a smaller set: the first ``train`` training images and ``test`` test images (or all)."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


def import_or_explain(module: str, package: str) -> ModuleType:
    """Import ``module``, or raise ImportError that says which package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module!r} ({error}). Install it with: pip install {package}"
        ) from error


def digits(test_fraction: float = 0.25, split_seed: int = 0) -> ImageData:
    """Load scikit-learn's 1,797 handwritten 8x8 digits, scaled to mean 0 and deviation 1.

    Args:
        test_fraction: Share of each class that goes to the test set (0 < fraction < 1).
        split_seed: Decides the split; the same seed always gives the same split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    import_or_explain("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels.numpy(), random_state=split_seed
    )
    train_images, test_images = _normalise(images[train], images[test])
    return ImageData(train_images, labels[train], test_images, labels[test], tuple(str(n) for n in range(10)))


def fashion_mnist(directory: str | os.PathLike[str] | None = None) -> ImageData:
    """Load Fashion-MNIST (60,000 + 10,000 grey 28x28 images), scaled to mean 0 and deviation 1.

    Xiao, Rasul and Vollgraf, "Fashion-MNIST" (https://arxiv.org/abs/1708.07747).

    Args:
        directory: Where the four ``*-ubyte.gz`` files lie. Default: the environment variable
            ``FASHION_MNIST_DIR``, else where Debian's package puts them.

    Raises:
        DatasetNotFoundError: A file is missing; the message says how to get the data.
        ValueError: A file is not a whole IDX file.
    """
    root = Path(directory or os.environ.get("FASHION_MNIST_DIR") or FASHION_DIRECTORY)
    missing = [name for name in _FASHION_FILES.values() if not (root / name).is_file()]
    if missing:
        raise DatasetNotFoundError(
            f"Fashion-MNIST is not in {root} (missing: {', '.join(missing)}). On Debian and Ubuntu: "
            "sudo apt-get update && sudo apt-get install dataset-fashion-mnist. Elsewhere: put the four "
            "*-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist in a folder and name it "
            "in the environment variable FASHION_MNIST_DIR."
        )
    arrays = {key: read_idx(root / name) for key, name in _FASHION_FILES.items()}
    images = {
        key: torch.from_numpy(array.astype(np.float32)).unsqueeze(1)
        for key, array in arrays.items()
        if key.endswith("images")
    }
    labels = {
        key: torch.from_numpy(array.astype(np.int64))
        for key, array in arrays.items()
        if key.endswith("labels")
    }
    train_images, test_images = _normalise(images["train_images"], images["test_images"])
    return ImageData(
        train_images, labels["train_labels"], test_images, labels["test_labels"], FASHION_CLASSES
    )


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes (the format of MNIST).

    Raises:
        ValueError: The file is truncated, or does not hold unsigned bytes in IDX format.
    """
    try:
        content = gzip.decompress(Path(path).read_bytes())
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{path} ends inside its header")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise ValueError(f"{path} holds {len(content) - header} bytes where its header promises {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _normalise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both sets by the mean and deviation of the training set."""
    mean, deviation = train.mean(), train.std()
    return (train - mean) / deviation, (test - mean) / deviation


Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def random_shift(images: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Move each image by up to ``pixels`` in both directions; what comes in repeats the border.

    Args:
        images: Shape ``(batch, channels, height, width)``.
        generator: Decides the moves.
        pixels: The largest move.
    """
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [pixels] * 4, mode="replicate")
    offsets = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator)
    rows = torch.arange(height) + offsets[0]
    columns = torch.arange(width) + offsets[1]
    index = torch.arange(batch)[:, None, None]
    # Indexing puts the channel dimension last; permute brings it back.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right, or not, with equal chance.

    Args:
        images: Shape ``(batch, channels, height, width)``.
        generator: Decides which ones.
    """
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


class BatchLoader:
    """Iterates over tensors in memory: what a ``DataLoader`` does, without the cost of single samples.

    The order and the augmentation depend on ``seed`` and on how many passes were made, nothing else; so
    ``state_dict`` is all that a resumed run needs to see the same batches.

    Args:
        images: Shape ``(n, ...)``.
        labels: Shape ``(n,)``.
        batch_size: Samples a batch.
        shuffle: A new order in every pass.
        augment: ``augment(images, generator)`` applied to each batch, such as :func:`random_shift`.
        seed: Decides order and augmentation.
        drop_last: Leave out a last batch that is smaller than the others.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ):
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.augment, self.drop_last = shuffle, augment, drop_last
        self.seed, self.passes = seed, 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        self.passes += 1
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            images = self.images[chosen]
            if self.augment is not None:
                images = self.augment(images, generator)
            yield images, self.labels[chosen]

    def state_dict(self) -> dict[str, int]:
        """Return how many passes were made, and the seed."""
        return {"seed": self.seed, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the loader that gave ``state`` was."""
        self.seed, self.passes = int(state["seed"]), int(state["passes"])
