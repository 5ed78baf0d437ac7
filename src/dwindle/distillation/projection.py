"""Layers that make a student's feature comparable with a teacher's; they are trained along, then thrown away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.config.errors import ConfigError

__all__ = ["Embedding", "LastDimension", "Projection", "channel_dimension", "needs_projection", "pooled_to"]

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}
_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


def pooled_to(maps: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return maps averaged down to other sizes; as they are when they have these.

    Args:
        maps: ``(batch, channels, *sizes)``.
        sizes: The wanted ones.

    Raises:
        ConfigError: There are more than three sizes.
    """
    wanted = tuple(sizes)
    if tuple(maps.shape[2:]) == wanted:
        return maps
    if len(wanted) not in _POOLS:
        raise ConfigError(f"maps with {len(wanted)} sizes cannot be pooled to {wanted}")
    return _POOLS[len(wanted)](maps, wanted if len(wanted) > 1 else wanted[0])


def channel_dimension(student: Sequence[int], teacher: Sequence[int]) -> int:
    """Return the dimension in which two features of one rank have their channels.

    The dimension that alone differs; else 1 for maps (four dimensions or more) and the last for sequences and vectors.

    Args:
        student: A shape.
        teacher: A shape of the same rank.
    """
    rank = len(student)
    for dimension in (rank - 1, 1):
        if 0 < dimension < rank and all(
            (mine == theirs) is (place != dimension)
            for place, (mine, theirs) in enumerate(zip(student, teacher, strict=True))
        ):
            return dimension
    return 1 if rank >= 4 else rank - 1


def needs_projection(student: Sequence[int], teacher: Sequence[int]) -> bool:
    """Whether two features of one sample differ in shape."""
    return tuple(student[1:]) != tuple(teacher[1:])


class Projection(nn.Module):
    """Bring the student's channels to the teacher's number, and both to the smaller of their sizes.

    A 1x1 convolution for maps (Romero et al., "FitNets", https://arxiv.org/abs/1412.6550, whose regressor is a
    convolution), a linear layer for sequences and vectors; none where the channels agree. Sizes are matched by
    adaptive average pooling.

    Args:
        student: Shape of the student's feature, ``(batch, channels)``, ``(batch, tokens, channels)`` or
            ``(batch, channels, *sizes)``.
        teacher: Shape of the teacher's, of the same rank.

    Raises:
        ConfigError: The ranks differ, or have no channels.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]):
        super().__init__()
        if len(student) != len(teacher) or len(student) < 2:
            raise ConfigError(
                f"features {tuple(student)} and {tuple(teacher)} have no channels that could be projected; their "
                "numbers of dimensions must agree"
            )
        self.dimension = channel_dimension(student, teacher)
        own, wanted = student[self.dimension], teacher[self.dimension]
        self.layer: nn.Module | None = None
        if own == wanted:
            return
        if self.dimension == len(student) - 1:
            self.layer = nn.Linear(own, wanted)
        elif len(student) in _CONVOLUTIONS:
            self.layer = _CONVOLUTIONS[len(student)](own, wanted, 1)
        else:
            raise ConfigError(f"maps {tuple(student)} have too many sizes to be projected")

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features in one shape; the teacher's takes no gradient."""
        projected = student if self.layer is None else self.layer(_in_type_of(student, self.layer))
        teacher = teacher.detach()
        if projected.dim() == 2 or projected.shape[1:] == teacher.shape[1:]:
            return projected, teacher
        mine, theirs = projected.movedim(self.dimension, 1), teacher.movedim(self.dimension, 1)
        sizes = [min(pair) for pair in zip(mine.shape[2:], theirs.shape[2:], strict=True)]
        return pooled_to(mine, sizes), pooled_to(theirs, sizes)


class LastDimension(nn.Module):
    """Bring the last dimension of the student's feature to the teacher's by a linear layer, as NNI's distiller does.

    Args:
        student: Shape of the student's feature.
        teacher: Shape of the teacher's.

    Raises:
        ConfigError: A feature has no dimensions.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]):
        super().__init__()
        if not student or not teacher:
            raise ConfigError(f"features {tuple(student)} and {tuple(teacher)} have no last dimension")
        self.layer = nn.Linear(student[-1], teacher[-1])

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected feature and the teacher's own."""
        return self.layer(_in_type_of(student, self.layer)), teacher


class Embedding(nn.Module):
    """Bring both features, averaged over their positions, to vectors of one width by a linear layer each.

    Args:
        student: Shape of the student's feature, as in :class:`Projection`.
        teacher: Shape of the teacher's; its rank may differ.
        width: Of the vectors.

    Raises:
        ConfigError: A feature has no channels.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], width: int = 128):
        super().__init__()
        for shape in (student, teacher):
            if len(shape) < 2:
                raise ConfigError(f"a feature {tuple(shape)} has no channels that could be embedded")
        self.student = nn.Linear(student[_channels(len(student))], width)
        self.teacher = nn.Linear(teacher[_channels(len(teacher))], width)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both embeddings ``(samples, width)``."""
        return (
            self.student(_in_type_of(_averaged(student), self.student)),
            self.teacher(_in_type_of(_averaged(teacher.detach()), self.teacher)),
        )


def _channels(rank: int) -> int:
    return 1 if rank >= 4 else rank - 1


def _averaged(feature: Tensor) -> Tensor:
    """``(samples, channels)``: the mean over positions."""
    return feature.movedim(_channels(feature.dim()), 1).flatten(2).mean(2) if feature.dim() > 2 else feature


def _in_type_of(feature: Tensor, layer: nn.Module) -> Tensor:
    """Features of autocast are as wide as the layer outside of it."""
    if torch.is_autocast_enabled(feature.device.type):
        return feature
    return feature.to(next(layer.parameters()).dtype)
