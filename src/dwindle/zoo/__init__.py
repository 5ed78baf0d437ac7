"""Small real models and data for demos, tests and benchmarks; imports nothing of the house."""

from dwindle.zoo.cutouts import cutout_names, read_cutout, scenes
from dwindle.zoo.datasets import (
    BatchLoader,
    DatasetNotFoundError,
    ImageData,
    digits,
    fashion_mnist,
    random_flip,
    random_shift,
)
from dwindle.zoo.language import documentation_text, minilm, movie_reviews, smollm2, token_windows
from dwindle.zoo.photographs import (
    DEBIAN_PHOTOGRAPHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PHOTOGRAPHS,
    photograph_sets,
    photographs,
    read_photograph,
)
from dwindle.zoo.pretrained import (
    efficientnet_lite0,
    efficientnet_lite0_timm,
    efficientnet_lite0_weights,
)
from dwindle.zoo.residual import (
    ResidualBlock,
    ResidualNetwork,
    digits_resnet,
    fashion_resnet,
    residual_network,
)

__all__ = [
    "DEBIAN_PHOTOGRAPHS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PHOTOGRAPHS",
    "BatchLoader",
    "DatasetNotFoundError",
    "ImageData",
    "ResidualBlock",
    "ResidualNetwork",
    "cutout_names",
    "digits",
    "digits_resnet",
    "documentation_text",
    "efficientnet_lite0",
    "efficientnet_lite0_timm",
    "efficientnet_lite0_weights",
    "fashion_mnist",
    "fashion_resnet",
    "minilm",
    "movie_reviews",
    "photograph_sets",
    "photographs",
    "random_flip",
    "random_shift",
    "read_cutout",
    "read_photograph",
    "residual_network",
    "scenes",
    "smollm2",
    "token_windows",
]
