"""The distillers of NNI 3.0, with their signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from dwindle import distillation
from dwindle.compat.nni.chain import Chained, run_chain
from dwindle.compat.nni.evaluator import Evaluator
from dwindle.config.errors import ConfigError
from dwindle.training import Compressor

TeacherPredict = Callable[[Any, nn.Module], Any]
Inner = distillation.DynamicLayerwiseDistiller | distillation.Adaptive1dLayerwiseDistiller


class TeacherModelBasedDistiller(Chained):
    """A distiller of dwindle with the calls of NNI's.

    Args:
        model: The student.
        config_list: What is compared, as in NNI 3.0.
        evaluator: Trains.
        teacher_model: The teacher; it is not wrapped, and left as it is.
        teacher_predict: ``f(batch, teacher_model)`` runs the teacher on a batch of the evaluator's loop.
        origin_loss_lambda: Weight of the task's own loss.
        existed_wrappers: Taken and not needed.

    Attributes:
        inner: The distiller of dwindle.
    """

    kind: ClassVar[type[Inner]] = distillation.DynamicLayerwiseDistiller

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator,
        teacher_model: nn.Module,
        teacher_predict: TeacherPredict,
        origin_loss_lambda: float = 1.0,
        existed_wrappers: Any | None = None,
    ) -> None:
        if not isinstance(evaluator, Evaluator):
            raise ConfigError(f"evaluator must be an evaluator, got a {type(evaluator).__name__}")
        if not callable(teacher_predict):
            raise ConfigError(f"teacher_predict must be a function, got a {type(teacher_predict).__name__}")
        self.bound_model, self.config_list, self.evaluator = model, config_list, evaluator
        self.teacher_model, self.teacher_predict = teacher_model, teacher_predict
        self.origin_loss_lambda = origin_loss_lambda
        self._training: Evaluator = evaluator
        self.inner: Inner = self.kind(
            model,
            config_list,
            teacher=teacher_model,
            origin_loss_lambda=origin_loss_lambda,
            predict=self._predict,
        )

    def _predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the teacher on the batch of the user's loop; where the loop does not say, on what the student saw."""
        if self._training.batch is None:
            return self.teacher_model(*args, **kwargs)
        return self.teacher_predict(self._training.batch, self.teacher_model)

    @property
    def origin_weight(self) -> float:
        """Weight of the task's own loss."""
        return self.origin_loss_lambda

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> nn.Module:
        """Train with the distillation loss; those that it was made from take part.

        Args:
            max_steps: Optimizer steps.
            max_epochs: Epochs.

        Returns:
            The student.
        """
        run_chain([*self.fused_compressors, self], max_steps, max_epochs)
        return self.bound_model

    def _start(self, evaluator: Evaluator) -> Compressor:
        self._training = evaluator
        self.inner.attach()
        return self.inner

    def _end(self, steps: int) -> None:
        self.inner.detach()

    def _withdraw(self) -> None:
        self.inner.detach()

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the student once."""
        with torch.no_grad():
            self.bound_model(*args, **kwargs)

    def wrap_model(self) -> None:
        """Nothing to do: nothing is wrapped."""

    def unwrap_model(self) -> nn.Module:
        """Return the student."""
        return self.bound_model

    def wrap_teacher_model(self) -> None:
        """Nothing to do: nothing is wrapped."""

    def unwrap_teacher_model(self) -> nn.Module:
        """Return the teacher."""
        return self.teacher_model


class DynamicLayerwiseDistiller(TeacherModelBasedDistiller):
    """Each target learns from the nearest of the teacher's modules that its ``link`` names."""


class Adaptive1dLayerwiseDistiller(TeacherModelBasedDistiller):
    """Targets whose last dimension differs from the teacher's get a linear layer; call ``track_forward`` first."""

    kind = distillation.Adaptive1dLayerwiseDistiller

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run both models once and make the linear layers."""
        assert isinstance(self.inner, distillation.Adaptive1dLayerwiseDistiller)
        self.inner.track_forward(*args, **kwargs)
