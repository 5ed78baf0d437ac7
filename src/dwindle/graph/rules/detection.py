"""Operators of torchvision: regions of interest, suppression of boxes, deformable convolution."""

from __future__ import annotations

from dwindle.graph.nodes import Node
from dwindle.graph.rules.registry import Scope, rule


@rule("roi_align", "roi_pool")
def regions(node: Node, scope: Scope) -> None:
    """Maps (N, C, H, W) and boxes (K, 5) to regions (K, C, height, width)."""
    maps, boxes = list(node.inputs())[:2]
    scope.freeze([maps.axes[0], *maps.axes[2:]], "spatial")
    scope.freeze(boxes.axes, "boxes")
    for output in node.outputs:
        spatial = [scope.leaf(size, "spatial") for size in output.shape[2:]]
        output.axes = [boxes.axes[0], maps.axes[1], *spatial]


@rule("nms")
def suppression(node: Node, scope: Scope) -> None:
    """Boxes (K, 4) and scores (K) to indices of the boxes that stay."""
    for value in node.inputs():
        scope.freeze(value.axes, "boxes")
    node.output.axes = [scope.leaf(size, "boxes") for size in node.output.shape]


@rule("deform_conv2d")
def deformable(node: Node, scope: Scope) -> None:
    """Data (N, C, H, W), weight (out, C / groups, kh, kw), offsets and a mask by place."""
    data, weight, offset, mask, bias = list(node.inputs())[:5]
    groups, offset_groups = int(node.argument("groups")), int(node.argument("offset_groups"))
    scope.freeze([*offset.axes[1:], *mask.axes[1:]], "offsets of a deformable convolution")
    scope.freeze([*weight.axes[2:], *data.axes[2:]], "spatial")
    scope.unify(bias.axes[0], weight.axes[0])
    if groups > 1 or offset_groups > 1:
        scope.freeze([data.axes[1], weight.axes[1]], "groups of a deformable convolution")
    if groups > 1:
        scope.freeze([weight.axes[0]], "groups of a deformable convolution")
    else:
        scope.unify(data.axes[1], weight.axes[1])
    spatial = [scope.leaf(size, "spatial") for size in node.output.shape[2:]]
    node.output.axes = [data.axes[0], weight.axes[0], *spatial]
