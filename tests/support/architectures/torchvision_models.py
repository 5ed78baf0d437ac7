"""Every model of torchvision: classification, segmentation, detection, video and optical flow, at full width.

Images are smaller than the usual 224 where the model takes any size: the weights are the same, the runs shorter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from support import torchvision_operators
from support.architectures.example import Builder, Example

_CLASSIFICATION = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34
resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn
vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
wide_resnet50_2
"""
CLASSIFICATION = _CLASSIFICATION.split()
_SEGMENTATION = """
deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50
lraspp_mobilenet_v3_large
"""
SEGMENTATION = _SEGMENTATION.split()
_DETECTION = """
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large
"""
DETECTION = _DETECTION.split()
_VIDEO = """
mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_b swin3d_s swin3d_t
"""
VIDEO = _VIDEO.split()
_OPTICAL_FLOW = """
raft_large raft_small
"""
OPTICAL_FLOW = _OPTICAL_FLOW.split()

#: Models that need larger images, and models whose image size is set when they are built.
IMAGE_SIZE = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 96, "vit_h_14": 112}
IMAGE_SIZE |= {name: 128 for name in CLASSIFICATION if name.startswith("vit_") and name != "vit_h_14"}


def classifier(name: str, **options: Any) -> Builder:
    """Images in, logits out."""

    def build() -> Example:
        from torchvision import models

        size = IMAGE_SIZE.get(name, 64)
        if name.startswith("vit_"):
            options["image_size"] = size
        return Example(models.get_model(name, weights=None, **options), (torch.randn(2, 3, size, size),))

    return build


def auxiliary(name: str) -> Builder:
    """As torchvision builds it for training: with heads that exist only there."""

    def build() -> Example:
        from torchvision import models

        model = models.get_model(name, weights=None, aux_logits=True, init_weights=False)
        size = IMAGE_SIZE.get(name, 64)
        return Example(model, (torch.randn(2, 3, size, size),), note="auxiliary heads in training")

    return build


def segmenter(name: str, auxiliary_head: bool) -> Builder:
    """Images in, a dict of maps out."""

    def build() -> Example:
        from torchvision import models

        options = {"aux_loss": True} if auxiliary_head else {}
        model = models.get_model(name, weights=None, weights_backbone=None, **options)
        return Example(model, (torch.randn(2, 3, 64, 64),))

    return build


def detector(name: str) -> Builder:
    """A list of images in; boxes out, or losses in training, where targets are given."""

    def build() -> Example:
        from torchvision import models

        torchvision_operators.install()
        extra: dict[str, Any] = {"num_keypoints": 5} if name.startswith("keypointrcnn") else {}
        extra["box_score_thresh" if "rcnn" in name else "score_thresh"] = (
            0.0  # random weights are sure of nothing
        )
        if "rcnn" in name:
            extra |= {
                "rpn_post_nms_top_n_test": 20,
                "rpn_post_nms_top_n_train": 20,
                "box_batch_size_per_image": 16,
            }
        sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
        model = models.get_model(
            name, weights=None, weights_backbone=None, **_classes(name), **sizes, **extra
        )
        images = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
        if name.startswith("ssdlite"):
            settle(model.backbone, torch.rand(4, 3, 320, 320))
        return Example(model, (images,), training=((images, [target(), target()]), {}))

    def target() -> dict[str, torch.Tensor]:
        made = {
            "boxes": torch.tensor([[8.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 88.0]]),
            "labels": torch.tensor([1, 2]),
        }
        if name.startswith("maskrcnn"):
            made["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
        if name.startswith("keypointrcnn"):
            made["labels"] = torch.tensor([1, 1])
            made["keypoints"] = torch.tensor([[[20.0, 30.0, 1.0]] * 5, [[40.0, 50.0, 1.0]] * 5])
        return made

    return build


def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms the statistics of real activations: with fresh ones signals fade with depth.

    Scores of boxes then differ by less than rounding, and which box comes first is chance.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _classes(name: str) -> dict[str, int]:
    return {} if name.startswith("keypointrcnn") else {"num_classes": 7}


def backbone(name: str) -> Builder:
    """The feature pyramid of a detector alone: images in, a dict of maps out."""

    def build() -> Example:
        model = detector(name)().model.backbone
        size = 320 if name.startswith("ssd") else 96
        return Example(model, (torch.rand(2, 3, size, size),), note="backbone of the detector")

    return build


def film(name: str) -> Builder:
    """Clips in, logits out."""

    def build() -> Example:
        from torchvision import models

        frames, size = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (4, 48))
        return Example(models.get_model(name, weights=None), (torch.randn(2, 3, frames, size, size),))

    return build


def flow(name: str) -> Builder:
    """Two images in, a list of flow fields out."""

    def build() -> Example:
        from torchvision import models

        pair = (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
        return Example(models.get_model(name, weights=None), pair, {"num_flow_updates": 2})

    return build


MODELS: dict[str, Builder] = {
    **{name: classifier(name) for name in CLASSIFICATION if name not in ("googlenet", "inception_v3")},
    **{name: auxiliary(name) for name in ("googlenet", "inception_v3")},
    **{name: segmenter(name, not name.startswith("lraspp")) for name in SEGMENTATION},
    **{name: detector(name) for name in DETECTION},
    **{f"{name}.backbone": backbone(name) for name in DETECTION},
    **{name: film(name) for name in VIDEO},
    **{name: flow(name) for name in OPTICAL_FLOW},
}
