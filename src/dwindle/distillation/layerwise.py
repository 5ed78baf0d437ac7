"""NNI's two distillers: pairs of layers alone, without the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.distillation.distiller import Distiller
from dwindle.training.inputs import forward_inputs

__all__ = ["Adaptive1dLayerwiseDistiller", "DynamicLayerwiseDistiller"]


class _LayerwiseDistiller(Distiller):
    """``sum over targets of lambda * min over links of d(student, teacher)``.

    Args:
        model: The student.
        config_list: What is compared; ``link`` may name several modules, of which the nearest counts.
        teacher: The teacher.
        origin_loss_lambda: Weight of the task's own loss, see :meth:`total`.
        example_inputs: As for :class:`Distiller`.
        predict: ``predict(args, kwargs)`` runs the teacher; None calls it as the student was called.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        *,
        teacher: nn.Module,
        origin_loss_lambda: float = 1.0,
        example_inputs: Any | None = None,
        predict: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ):
        if isinstance(origin_loss_lambda, bool) or not isinstance(origin_loss_lambda, int | float):
            raise ConfigError(f"origin_loss_lambda must be a number, got {origin_loss_lambda!r}")
        super().__init__(
            model, config_list, teacher=teacher, logits_weight=0.0, example_inputs=example_inputs
        )
        self.origin_loss_lambda, self._own_predict = origin_loss_lambda, predict

    def _predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (
            super()._predict(args, kwargs) if self._own_predict is None else self._own_predict(args, kwargs)
        )

    def total(self, task_loss: Tensor) -> Tensor:
        """Return ``origin_loss_lambda * task_loss + loss()``, in place of adding :meth:`loss` by hand."""
        return self.origin_loss_lambda * task_loss + self.loss()


class DynamicLayerwiseDistiller(_LayerwiseDistiller):
    """Every target learns from the nearest of its linked teacher modules, at each step anew."""


class Adaptive1dLayerwiseDistiller(_LayerwiseDistiller):
    """Targets whose last dimension differs from their teacher's get a learned linear layer; one link each.

    :meth:`track_forward` (or ``example_inputs``) must run before training, so that the sizes are known.
    """

    projects_last_dimension = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for link in self.links:
            if len(link.teacher_modules) > 1:
                raise ConfigError(
                    f"{link.module}.{link.target}: Adaptive1dLayerwiseDistiller takes one link, got "
                    f"{', '.join(map(repr, link.teacher_modules))}; DynamicLayerwiseDistiller takes several"
                )

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run both models once with these inputs and make the linear layers."""
        inputs = forward_inputs(self.model, args or kwargs, lambda batch: batch)
        self._losses.prepare(self.model, self.teacher, (inputs[0], kwargs or inputs[1]))

    def attach(self) -> None:
        """Put the recording hooks on the model.

        Raises:
            DwindleError: The sizes are not known yet.
        """
        if not self._losses.ready:
            raise DwindleError("call track_forward(example inputs) first: it makes the linear layers")
        super().attach()
