"""Binary quantizers with the weights and activations of one paper each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.quantization.binarization import BinaryQuantizer
from dwindle.quantization.binary_stages import BinaryStages

__all__ = ["BNNQuantizer", "BiRealQuantizer", "DoReFaBinaryQuantizer", "XNORQuantizer"]


class _Named(BinaryQuantizer):
    """A :class:`BinaryQuantizer` with the weights and activations of one paper.

    Args:
        model: As in :class:`BinaryQuantizer`.
        config_list: As there.
        stages: As there.
        example_inputs: As there.
    """

    names = ("xnor", "scale_threshold")

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        stages: BinaryStages | None = None,
        example_inputs: Any = None,
    ) -> None:
        weights, activations = self.names
        super().__init__(
            model,
            config_list,
            weights=weights,
            activations=activations,
            stages=stages,
            example_inputs=example_inputs,
        )


class BNNQuantizer(_Named):
    """Signs for both, clipped straight through (Hubara et al., https://arxiv.org/abs/1602.02830)."""

    names = ("bnn", "bnn")


class XNORQuantizer(_Named):
    """Signs times channel means for weights, learned steps for inputs (NNCF, https://arxiv.org/abs/2002.08679)."""

    names = ("xnor", "scale_threshold")


class DoReFaBinaryQuantizer(_Named):
    """Signs times one mean for weights, ``round(clip(x, 0, 1))`` for inputs (https://arxiv.org/abs/1606.06160)."""

    names = ("dorefa", "dorefa")


class BiRealQuantizer(_Named):
    """Signs with a polynomial derivative (Liu et al., https://arxiv.org/abs/1808.00278); shortcuts stay in float."""

    names = ("bireal", "bireal")
