"""Distillation: a model learns from a teacher, by its outputs and by pairs of intermediate tensors."""

from dwindle.distillation.distiller import Distiller, FeatureLink
from dwindle.distillation.losses import FEATURE_LOSSES, divergence, feature_loss, mean_squared_error

__all__ = [
    "FEATURE_LOSSES",
    "Distiller",
    "FeatureLink",
    "divergence",
    "feature_loss",
    "mean_squared_error",
]
