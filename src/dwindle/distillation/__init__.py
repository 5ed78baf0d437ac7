"""Distillation: a model learns from a teacher, by its outputs and by pairs of intermediate tensors."""

from dwindle.distillation.attention_maps import attention_map_divergence, attention_map_error
from dwindle.distillation.attention_transfer import activation_attention, attention_transfer
from dwindle.distillation.binary import binary_divergence
from dwindle.distillation.cache import TeacherCache
from dwindle.distillation.contrastive import contrastive
from dwindle.distillation.correlation import correlation_distance
from dwindle.distillation.decoupled import decoupled_divergence
from dwindle.distillation.distiller import Distiller
from dwindle.distillation.layerwise import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from dwindle.distillation.links import FeatureLink
from dwindle.distillation.losses import divergence, mean_squared_error
from dwindle.distillation.methods import FEATURE_LOSSES, LOGITS_LOSSES, METHODS, feature_loss
from dwindle.distillation.moving_teacher import MovingTeacher, moving_average
from dwindle.distillation.norm_direction import norm_and_direction
from dwindle.distillation.probabilistic import neighbour_probabilities
from dwindle.distillation.projection import Projection
from dwindle.distillation.relational import relation_angles, relation_distances
from dwindle.distillation.similarity import similarity
from dwindle.distillation.token_relations import token_relations

__all__ = [
    "FEATURE_LOSSES",
    "LOGITS_LOSSES",
    "METHODS",
    "Adaptive1dLayerwiseDistiller",
    "Distiller",
    "DynamicLayerwiseDistiller",
    "FeatureLink",
    "MovingTeacher",
    "Projection",
    "TeacherCache",
    "activation_attention",
    "attention_map_divergence",
    "attention_map_error",
    "attention_transfer",
    "binary_divergence",
    "contrastive",
    "correlation_distance",
    "decoupled_divergence",
    "divergence",
    "feature_loss",
    "mean_squared_error",
    "moving_average",
    "neighbour_probabilities",
    "norm_and_direction",
    "relation_angles",
    "relation_distances",
    "similarity",
    "token_relations",
]
