"""One-shot pruners of NNI 2.x: by weights, and by what a short training shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle import pruning
from dwindle.compat.nni.v2.compressor import ConfigList, Pruner, with_mode
from dwindle.compat.nni.v2.evaluator import read_arguments
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError


class _BankPruner(pruning.LevelPruner):
    """Ranks weights within banks of a given shape, so that every bank loses the same share.

    The metric is the rank of a weight in its bank, and of equal ranks the smaller weight goes first.
    """

    bank: tuple[int, ...] = (1,)

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return ranks plus a share below 1 that grows with the absolute value."""
        shape = tuple(weight.shape)
        bank = (1,) * (len(shape) - len(self.bank)) + self.bank
        if len(bank) != len(shape) or any(size % own for size, own in zip(shape, bank, strict=True)):
            raise ConfigError(
                f"{target}: balance_gran {list(self.bank)} does not divide the shape {list(shape)}"
            )
        split = [part for size, own in zip(shape, bank, strict=True) for part in (size // own, own)]
        order = [*range(0, len(split), 2), *range(1, len(split), 2)]
        size = weight.abs().double()
        banks = size.reshape(split).permute(order)
        flat = banks.reshape(*banks.shape[: len(shape)], -1)
        ranks = flat.argsort(dim=-1, stable=True).argsort(dim=-1).reshape(banks.shape)
        back = [order.index(place) for place in range(len(order))]
        return ranks.permute(back).reshape(shape) + size / (size.max() + 1.0) * 0.5


class LevelPruner(Pruner):
    """Single weights with the smallest absolute value go.

    Args:
        model: The model.
        config_list: The config.
        mode: ``normal``, or ``balance``: every bank of ``balance_gran`` loses the same share.
        balance_gran: Shape of a bank, for the last dimensions of a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        mode: str = "normal",
        balance_gran: list[int] | None = None,
    ) -> None:
        super().__init__(model, config_list)
        if mode not in ("normal", "balance"):
            raise ConfigError(f"mode {mode!r} is not one of normal, balance")
        if mode == "normal":
            self.inner = pruning.LevelPruner(model, config_list)
        else:
            if not balance_gran:
                raise ConfigError("mode 'balance' needs balance_gran, the shape of a bank")
            own = _BankPruner(model, config_list)
            own.bank = tuple(balance_gran)
            self.inner = own


class _NormPruner(Pruner):
    kind: type[pruning.Pruner]

    def __init__(
        self, model: nn.Module, config_list: ConfigList, mode: str = "normal", dummy_input: Any = None
    ) -> None:
        super().__init__(model, config_list)
        entries, given = with_mode(config_list, mode, dummy_input)
        self.inner = self.kind(model, entries, **given)


class L1NormPruner(_NormPruner):
    """Output channels with the smallest L1 norm go.

    Args:
        model: The model.
        config_list: The config.
        mode: ``normal`` or ``dependency_aware``.
        dummy_input: Example inputs.
    """

    kind = pruning.L1NormPruner


class L2NormPruner(_NormPruner):
    """Output channels with the smallest L2 norm go. Arguments as :class:`L1NormPruner`."""

    kind = pruning.L2NormPruner


class FPGMPruner(_NormPruner):
    """Output channels nearest to the geometric median go. Arguments as :class:`L1NormPruner`."""

    kind = pruning.FPGMPruner


_ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "relu6": nn.functional.relu6}


class _ActivationPruner(Pruner):
    kind: type[pruning.ActivationAPoZRankPruner] | type[pruning.ActivationMeanRankPruner]

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        tail = ["activation", "mode", "dummy_input"]
        given = read_arguments(
            ["evaluator", "training_steps", *tail],
            ["trainer", "traced_optimizer", "criterion", "training_batches", *tail],
            {"activation": "relu", "mode": "normal", "dummy_input": None},
            args,
            kwargs,
        )
        super().__init__(model, config_list, given["evaluator"])
        if given["activation"] not in _ACTIVATIONS:
            raise ConfigError(f"activation {given['activation']!r} is not one of {', '.join(_ACTIVATIONS)}")
        entries, more = with_mode(config_list, given["mode"], given["dummy_input"])
        self.own_steps = given["training_steps"]
        self.inner = self.kind(
            model,
            entries,
            activation=_ACTIVATIONS[given["activation"]],
            training_steps=self.own_steps,
            **more,
        )


class ActivationAPoZRankPruner(_ActivationPruner):
    """Channels whose activations are zero most often go.

    Arguments: ``model, config_list, evaluator, training_steps, activation='relu', mode='normal', dummy_input=None``,
    or with ``trainer, traced_optimizer, criterion, training_batches`` in place of the evaluator and its steps.
    """

    kind = pruning.ActivationAPoZRankPruner


class ActivationMeanRankPruner(_ActivationPruner):
    """Channels with the smallest mean activation go. Arguments as :class:`ActivationAPoZRankPruner`."""

    kind = pruning.ActivationMeanRankPruner


class TaylorFOWeightPruner(Pruner):
    """Channels whose weights have the smallest first order effect on the loss go.

    Arguments: ``model, config_list, evaluator, training_steps, mode='normal', dummy_input=None``, or with ``trainer,
    traced_optimizer, criterion, training_batches`` in place of the evaluator and its steps. Modes are ``normal``,
    ``global`` and ``dependency_aware``.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        tail = ["mode", "dummy_input"]
        given = read_arguments(
            ["evaluator", "training_steps", *tail],
            ["trainer", "traced_optimizer", "criterion", "training_batches", *tail],
            {"mode": "normal", "dummy_input": None},
            args,
            kwargs,
        )
        super().__init__(model, config_list, given["evaluator"])
        entries, more = with_mode(config_list, given["mode"], given["dummy_input"])
        self.own_steps = given["training_steps"]
        self.inner = pruning.TaylorPruner(model, entries, training_steps=self.own_steps, **more)
