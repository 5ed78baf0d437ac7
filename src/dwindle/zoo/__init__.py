"""Small real models and data for demos, tests and benchmarks; imports nothing of the house."""

from dwindle.zoo.datasets import (
    BatchLoader,
    DatasetNotFoundError,
    ImageData,
    digits,
    fashion_mnist,
    random_flip_and_shift,
    random_shift,
)
from dwindle.zoo.residual import (
    ResidualBlock,
    ResidualNetwork,
    digits_resnet,
    fashion_resnet,
    residual_network,
)

__all__ = [
    "BatchLoader",
    "DatasetNotFoundError",
    "ImageData",
    "ResidualBlock",
    "ResidualNetwork",
    "digits",
    "digits_resnet",
    "fashion_mnist",
    "fashion_resnet",
    "random_flip_and_shift",
    "random_shift",
    "residual_network",
]
