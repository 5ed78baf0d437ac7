"""One small rule an operator family: how the axes of its results follow from the axes of its arguments."""

from dwindle.graph.rules import (
    aliases,
    contraction,
    creation,
    detection,
    distance,
    elementwise,
    experts,
    indexing,
    normalization,
    products,
    recurrent,
    reduction,
    shape,
    spectral,
)
from dwindle.graph.rules.registry import register_axis_rule, rule_for

__all__ = [
    "aliases",
    "contraction",
    "creation",
    "detection",
    "distance",
    "elementwise",
    "experts",
    "indexing",
    "normalization",
    "products",
    "recurrent",
    "reduction",
    "register_axis_rule",
    "rule_for",
    "shape",
    "spectral",
]
