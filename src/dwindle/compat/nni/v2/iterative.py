"""Iterative pruners of NNI 2.x: prune, train, prune again; with real shrinking (``speedup``) or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dwindle import pruning, simulate
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.compat.nni.speedup import completed
from dwindle.compat.nni.v2.compressor import ConfigList, Pruner
from dwindle.compat.nni.v2.evaluator import judges, read_arguments
from dwindle.compat.nni.v2.one_shot import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    TaylorFOWeightPruner,
)
from dwindle.compat.nni.v2.trained import ADMMPruner, SlimPruner
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.realize import Round, RoundsResult, lottery_ticket, prune_in_rounds

ALGORITHMS: dict[str, type[Pruner]] = {
    "level": LevelPruner,
    "l1": L1NormPruner,
    "l2": L2NormPruner,
    "fpgm": FPGMPruner,
    "slim": SlimPruner,
    "apoz": ActivationAPoZRankPruner,
    "mean_activation": ActivationMeanRankPruner,
    "taylorfo": TaylorFOWeightPruner,
    "admm": ADMMPruner,
}
#: What training pruners need beside model and config, when only an evaluator is given.
_TRAINED = ("slim", "apoz", "mean_activation", "taylorfo", "admm")

Best = tuple[int | str, nn.Module, dict[str, dict[str, Tensor]], float | None, list[dict[str, Any]]]


def algorithm(name: str) -> type[Pruner]:
    """Return the pruner of a name such as ``l1``.

    Raises:
        ConfigError: There is none.
    """
    if name not in ALGORITHMS:
        raise ConfigError(
            f"pruning_algorithm {name!r} is not one of {', '.join(ALGORITHMS)}{did_you_mean(name, ALGORITHMS)}"
        )
    return ALGORITHMS[name]


class Handles:
    """Makes pruners of dwindle by NNI's names, and remembers the handle of each, which knows how to train it."""

    def __init__(self, name: str, parameters: Mapping[str, Any], evaluator: Evaluator | None) -> None:
        self.kind, self.parameters = algorithm(name), dict(parameters)
        if name in _TRAINED and evaluator is not None and not {"evaluator", "trainer"} & set(self.parameters):
            self.parameters["evaluator"] = evaluator
        self.made: dict[int, Pruner] = {}
        #: Example inputs, when what is behind a masked channel is to be masked too, so that it can be cut.
        self.inputs: tuple[Any, ...] | None = None

    def make(self, model: nn.Module, config_list: ConfigList, **given: Any) -> pruning.Pruner:
        """Return a pruner for a model."""
        handle = self.kind(model, config_list, **self.parameters)
        inner = handle.inner
        assert isinstance(inner, pruning.Pruner)
        self.made = {id(inner): handle}
        return inner

    def sparsify(self, model: nn.Module, inner: pruning.Pruner, at: Round) -> None:
        """Make the masks, with training where it needs one."""
        self.made[id(inner)].compress()
        if self.inputs is not None:
            whole = completed(model, simulate.get_masks(model), self.inputs, {})
            simulate.attach_masks(model, [(target, mask, "mul", None) for target, mask in whole.items()])


class IterativePruner:
    """Base of the iterative pruners.

    Args:
        model: The model; pruned in place.
        config_list: The goals.
        evaluator: Trains and evaluates, or None.
        finetuner: ``f(model)`` trains, in place of the evaluator's training.
        scorer: ``f(model)`` gives a score, in place of the evaluator's.
        dummy_input: Example inputs, for speedup.
        log_dir: Where masks of each round are written to when ``keep_intermediate_result`` is set.
        keep_intermediate_result: See above.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        *,
        evaluator: Evaluator | None = None,
        finetuner: Callable[[nn.Module], Any] | None = None,
        scorer: Callable[[nn.Module], Any] | None = None,
        dummy_input: Any = None,
        log_dir: str | Path = ".",
        keep_intermediate_result: bool = False,
    ) -> None:
        self.bound_model = model
        self.config_list = [dict(entry) for entry in config_list]
        self.evaluator, self.finetuner, self.scorer = evaluator, finetuner, scorer
        self.dummy_input = dummy_input if dummy_input is not None else getattr(evaluator, "dummy_input", None)
        self.log_dir, self.keep = Path(log_dir), keep_intermediate_result
        self._best: Best | None = None

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Prune, until the goals are reached.

        Returns:
            The model and its masks.
        """
        raise NotImplementedError

    def get_best_result(self) -> Best:
        """Return task, model, masks, score and config of the result.

        Raises:
            ConfigError: ``compress()`` was not called.
        """
        if self._best is None:
            raise ConfigError("call compress() first")
        return self._best

    def finetune(self, model: nn.Module) -> None:
        """Train as the user said, or not at all."""
        if self.finetuner is not None:
            self.finetuner(model)
        elif self.evaluator is not None and self.evaluator.optimizers is not None:
            self.evaluator.finetune(model)

    def score(self, model: nn.Module) -> float | None:
        """Return the score of a model; None when nobody said how."""
        if self.scorer is not None:
            return float(self.scorer(model))
        return None if self.evaluator is None else self.evaluator.score(model)

    def inputs(self, needed_for: str) -> tuple[Any, ...]:
        """Return the example inputs.

        Raises:
            ConfigError: There are none.
        """
        if self.dummy_input is None:
            raise ConfigError(f"{needed_for} needs dummy_input (of the evaluator)")
        given = self.dummy_input
        return tuple(given) if isinstance(given, tuple | list) else (given,)

    def keep_masks(self, task: int, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the masks of a round, where that is wanted."""
        if self.keep:
            folder = self.log_dir / str(task)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(
                {name: {k: m.clone() for k, m in own.items()} for name, own in masks.items()},
                folder / "masks.pth",
            )


class _RoundsPruner(IterativePruner):
    """The pruners that follow a schedule of ratios."""

    schedule: Literal["linear", "agp", "geometric"] = "linear"

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        pruning_algorithm: str,
        total_iteration: int,
        log_dir: str = ".",
        keep_intermediate_result: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        given = _arguments(self._more(), args, kwargs)
        super().__init__(
            model,
            config_list,
            **judges(given),
            log_dir=log_dir,
            keep_intermediate_result=keep_intermediate_result,
        )
        self.total_iteration, self.speedup = total_iteration, given["speedup"]
        self.reset_weight = given.get("reset_weight", False)
        self.handles = Handles(pruning_algorithm, given["pruning_params"], self.evaluator)

    @staticmethod
    def _more() -> list[str]:
        return []

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Prune and train in ``total_iteration`` rounds."""
        optimizer = None
        if self.evaluator is not None and isinstance(self.evaluator.optimizers, torch.optim.Optimizer):
            optimizer = self.evaluator.optimizers
        arguments: dict[str, Any] = {
            "rounds": self.total_iteration,
            "train": self._train,
            "optimizer": optimizer,
            "sparsify": self.handles.sparsify,
            "shrink": self.speedup,
        }
        if self.speedup:
            arguments["example_inputs"] = self.handles.inputs = self.inputs("speedup")
        if self.schedule == "geometric" and self.reset_weight:
            result = lottery_ticket(self.bound_model, self.config_list, self.handles.make, **arguments)
        else:
            result = prune_in_rounds(
                self.bound_model, self.config_list, self.handles.make, schedule=self.schedule, **arguments
            )
        return self._ended(result)

    def _train(self, model: nn.Module, at: Round) -> None:
        self.keep_masks(at.number, simulate.masks_as_nested(model))
        self.finetune(model)

    def _ended(self, result: RoundsResult) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        masks = result.masks
        self._best = (self.total_iteration, result.model, masks, self.score(result.model), self.config_list)
        return result.model, masks


class LinearPruner(_RoundsPruner):
    """Ratios of ``i / total_iteration`` of the goal.

    Arguments: ``model, config_list, pruning_algorithm, total_iteration, log_dir='.', keep_intermediate_result=False,
    evaluator=None, speedup=False, pruning_params={}``; 2.0 to 2.8: ``finetuner=None, speedup=False, dummy_input=None,
    evaluator=None, pruning_params={}`` after ``keep_intermediate_result``.
    """

    schedule = "linear"


class AGPPruner(_RoundsPruner):
    """Ratios of ``1 - (1 - i / total_iteration)**3`` of the goal. Arguments as :class:`LinearPruner`."""

    schedule = "agp"


class LotteryTicketPruner(_RoundsPruner):
    """Ratios of ``1 - (1 - goal)**(i / total_iteration)``; weights and optimizer begin anew in each round.

    Arguments as :class:`LinearPruner`, with ``reset_weight=True`` before ``pruning_params``. The model is trained once
    before the first pruning.
    """

    schedule = "geometric"

    @staticmethod
    def _more() -> list[str]:
        return ["reset_weight"]


def _arguments(more: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments behind ``keep_intermediate_result``: an evaluator, or the functions of 2.0 to 2.8."""
    first = kwargs.get("evaluator", args[0] if args else None)
    new = isinstance(first, Evaluator) or (
        not args and not {"finetuner", "dummy_input", "evaluator"} & set(kwargs)
    )
    names = ["evaluator", "speedup"] if new else ["finetuner", "speedup", "dummy_input", "evaluator"]
    defaults = {name: None for name in names} | {"speedup": False, "pruning_params": {}}
    defaults |= {name: True for name in more}
    return read_arguments([*names, *more, "pruning_params"], None, defaults, args, kwargs)
