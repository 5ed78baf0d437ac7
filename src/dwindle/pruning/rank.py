"""Pruners that ask how much information feature maps hold: their rank (HRank), their independence (CHIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.pruning.activation import ActivationPruner

#: Numbers that the matrices of one decomposition may hold together.
_NUMBERS_AT_ONCE = 1 << 24


def matrix_ranks(maps: Tensor) -> Tensor:
    """Return the rank of each feature map (Lin et al., HRank, equation 6), in the precision of the maps.

    In a higher one the rounding errors of the maps themselves would count as information.

    Args:
        maps: ``[samples, channels, height, width]``.

    Returns:
        ``[samples, channels]``, float64.
    """
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return torch.linalg.matrix_rank(wide).double()


def channel_independence(maps: Tensor) -> Tensor:
    """Return for each channel how much the nuclear norm of all feature maps falls without it (CHIP, equation 4).

    With the maps of one sample as rows of a matrix A, that is ``||A||_* - ||M_i * A||_*`` where M_i sets row i to
    zero. The singular values come from the smaller Gram matrix, of which taking a row away is a change of rank one
    (or one row and column less), so that no matrix is wider than the channels or the places, whichever are fewer.

    Args:
        maps: ``[channels, places]`` of one sample.

    Returns:
        ``[channels]``, float64.
    """
    wide = maps.double()
    channels, places = wide.shape
    size = min(channels, places)
    whole = _nuclear_norm(wide @ wide.T if channels <= places else wide.T @ wide)
    chunk = max(1, _NUMBERS_AT_ONCE // max(size * size, 1))
    without = [
        _nuclear_norms_without(wide, torch.arange(start, min(start + chunk, channels), device=wide.device))
        for start in range(0, channels, chunk)
    ]
    return whole - torch.cat(without)


def _nuclear_norms_without(wide: Tensor, rows: Tensor) -> Tensor:
    channels, places = wide.shape
    if channels <= places:
        stays = torch.ones(rows.numel(), channels, dtype=wide.dtype, device=wide.device)
        stays[torch.arange(rows.numel(), device=wide.device), rows] = 0
        return _nuclear_norm((wide @ wide.T) * stays[:, :, None] * stays[:, None, :])
    gone = wide[rows]
    return _nuclear_norm(wide.T @ wide - gone[:, :, None] * gone[:, None, :])


def _nuclear_norm(gram: Tensor) -> Tensor:
    """Return the sum of the singular values of matrices, from their Gram matrices."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)


class HRankPruner(ActivationPruner):
    """Channels whose feature maps have the lowest rank, on average over samples, go (Lin et al., arXiv:2002.10179).

    For convolutions with two spatial dimensions. A few hundred samples are enough.
    """

    dimensions: ClassVar[int] = 4

    def statistic(self, maps: Tensor) -> tuple[Tensor, int]:
        """Sum up the ranks of each channel."""
        return matrix_ranks(maps).sum(0), maps.shape[0]


class CHIPPruner(ActivationPruner):
    """Channels whose feature maps the others can replace best go (Sui et al., CHIP, arXiv:2110.13981).

    The metric is the channel independence, averaged over samples: how much the nuclear norm of all feature maps of
    a layer falls without one of them. It costs one decomposition for each channel and sample.

    Args:
        model: As in :class:`ActivationPruner`.
        config_list: As in :class:`ActivationPruner`.
        example_inputs: As in :class:`ActivationPruner`.
        example_kwargs: As in :class:`ActivationPruner`.
        samples: At most so many samples of each batch are looked at; None takes all.
        options: As in :class:`ActivationPruner`.

    Raises:
        ConfigError: An argument is not valid.
    """

    dimensions: ClassVar[int] = 4

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        samples: int | None = None,
        **options: Any,
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or samples < 1):
            raise ConfigError(f"samples: {samples!r} is not a positive number")
        super().__init__(model, config_list, example_inputs, example_kwargs, **options)
        self.samples = samples

    def statistic(self, maps: Tensor) -> tuple[Tensor, int]:
        """Sum up the independence of each channel."""
        chosen = maps[: self.samples]
        return torch.stack([channel_independence(sample.flatten(1)) for sample in chosen]).sum(0), len(chosen)
