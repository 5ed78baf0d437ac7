"""The pruner of attention heads of NNI 1.x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dwindle import pruning
from dwindle.compat.nni.v2.compressor import ConfigList, Pruner
from dwindle.compat.nni.v2.evaluator import TrainerEvaluator, by_epoch
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.training import Rewinding

Trainer = Callable[..., Any]


class TransformerHeadPruner(Pruner):
    """The least important attention heads go.

    Args:
        model: The model.
        config_list: ``sparsity`` of the projections of the attentions.
        head_hidden_dim: Width of a head; checked against what the analysis of the model finds.
        attention_name_groups: Names of query, key, value and output projection of each attention; taken and checked,
            the analysis finds them itself.
        dummy_input: Example inputs; needed.
        ranking_criterion: ``l1_weight``, ``l2_weight``, ``l1_activation``, ``l2_activation`` or ``taylorfo``.
        global_sort: Rank the heads of all layers together; one head of a layer always stays.
        num_iterations: Rounds of pruning, with training between.
        epochs_per_iteration: Epochs between two rounds.
        optimizer: For training.
        trainer: ``f(model, optimizer, criterion, epoch)``; for ``taylorfo`` and for training.
        criterion: The loss.
        forward_runner: ``f(model)`` runs the model over data, for the activation criteria.
        algo_kwargs: None are known.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        head_hidden_dim: int,
        attention_name_groups: Sequence[Sequence[str]] | None = None,
        dummy_input: Any = None,
        ranking_criterion: str = "l1_weight",
        global_sort: bool = False,
        num_iterations: int = 1,
        epochs_per_iteration: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
        trainer: Trainer | None = None,
        criterion: Callable[..., Any] | None = None,
        forward_runner: Callable[[nn.Module], Any] | None = None,
        **algo_kwargs: Any,
    ) -> None:
        super().__init__(model, config_list)
        if algo_kwargs:
            raise ConfigError(f"unknown: {', '.join(algo_kwargs)}")
        if dummy_input is None:
            raise ConfigError("TransformerHeadPruner needs dummy_input, from which the heads are found")
        modules = dict(model.named_modules())
        for name in [name for group in attention_name_groups or () for name in group]:
            if name not in modules:
                raise ConfigError(
                    f"attention_name_groups: there is no module {name!r}{did_you_mean(name, modules)}"
                )
        self.training = None
        if trainer is not None and optimizer is not None and criterion is not None:
            self.training = TrainerEvaluator(by_epoch(trainer), optimizer, criterion)
        name = "taylor" if ranking_criterion == "taylorfo" else ranking_criterion
        if name == "taylor" and self.training is None:
            raise ConfigError("ranking_criterion 'taylorfo' needs optimizer, trainer and criterion")
        runs = name.endswith("_activation")
        if runs and forward_runner is None:
            raise ConfigError(f"ranking_criterion {ranking_criterion!r} needs forward_runner")
        if num_iterations > 1 and self.training is None:
            raise ConfigError("more than one iteration needs optimizer, trainer and criterion")
        self.num_iterations, self.epochs_per_iteration = num_iterations, epochs_per_iteration
        observation: dict[str, Any] = {"data": [forward_runner]} if runs else {}
        inner = _RunnerPruner(
            model,
            config_list,
            example_inputs=dummy_input,
            criterion=name,  # type: ignore[arg-type]
            scope="global" if global_sort else "local",
            **observation,
        )
        wide = [
            target
            for target, planned in inner.plan.goals.items()
            if planned.shape[planned.granularity.axis] % head_hidden_dim
        ]
        if wide:
            raise ConfigError(f"head_hidden_dim {head_hidden_dim} does not divide the outputs of {wide[0]}")
        self.inner = inner

    def compress(self) -> nn.Module:  # type: ignore[override]
        """Prune; return the model."""
        inner = self.inner
        assert isinstance(inner, pruning.TransformerHeadPruner)
        try:
            for number in range(1, self.num_iterations + 1):
                if number > 1:
                    assert self.training is not None
                    self.training.train(self.bound_model, [], None, self.epochs_per_iteration)
                self._round(inner, number)
        finally:
            inner.stop_watching()
        self._masks = inner.masks
        return self.bound_model

    def _round(self, inner: pruning.TransformerHeadPruner, number: int) -> None:
        progress = number / self.num_iterations
        if inner.criterion == "taylor":
            assert self.training is not None
            if number == 1:
                inner.compress(0.0)
            values = Rewinding(self.bound_model, self.training.optimizer)
            self.training.train(self.bound_model, [inner], None, 1)
            values.restore()  # this training only showed gradients
        if number == 1 and inner.criterion != "taylor":
            inner.compress(progress)
        else:
            inner.update(progress)


class _RunnerPruner(pruning.TransformerHeadPruner):
    """Its data is one function that runs the model over everything."""

    def forward(self, batch: Callable[[nn.Module], Any]) -> None:
        """Call the function."""
        with torch.no_grad():
            batch(self.model)
