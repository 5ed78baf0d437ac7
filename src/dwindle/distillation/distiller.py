"""The distiller: a compressor whose loss pulls a model towards a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import resolve
from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.distillation.losses import FEATURE_LOSSES, class_dimension, divergence, feature_loss
from dwindle.distillation.recording import CallRecorder, TargetRecorder
from dwindle.graph.modes import modes_kept
from dwindle.training.batches import logits_of
from dwindle.training.schedule import Schedule, value_at

__all__ = ["Distiller", "FeatureLink"]


@dataclass(frozen=True)
class FeatureLink:
    """One target of the student and what it is compared with.

    Attributes:
        module: The student's module.
        target: ``_output_0``, ``_input_0`` and so on.
        teacher_modules: Modules of the teacher; the nearest of them counts (the smallest loss).
        weight: Weight of this target's loss (``lambda`` in a config_list).
        method: ``mse`` or ``kl``.
    """

    module: str
    target: str
    teacher_modules: tuple[str, ...]
    weight: float
    method: str


class Distiller:
    """Pull a model towards a teacher while it is trained.

    ``loss()`` is ``logits_weight * T**2 * KL(teacher || student)`` of the softened outputs of the last
    training forward pass, plus, for every target of ``config_list``, ``lambda`` times the distance to the
    nearest linked teacher module. The teacher sees the very inputs the model saw: they are recorded by hooks,
    and nothing is asked of the training loop. It runs in evaluation mode and without gradients, once per
    ``loss()``, and is left exactly as it is.

    Hinton et al., https://arxiv.org/abs/1503.02531. The usual mixture with the task's loss is
    ``(1 - logits_weight) * task + run.loss()``.

    Args:
        model: The student.
        config_list: Pairs of intermediate tensors, see ``dwindle.config`` (kind ``distillation``): keys
            ``lambda``, ``link`` (``"auto"``: the module of the same name) and ``apply_method``.
        teacher: The model to learn from, such as a ``copy.deepcopy`` of the model before pruning.
        temperature: Softens both distributions; a number above 0, or a schedule over steps.
        logits_weight: Weight of the outputs' loss, a number or a schedule; 0 leaves the outputs out.
        logits: ``logits(outputs) -> tensor`` for models whose outputs hold their logits in an unusual place.
            Default: the tensor itself, ``.logits``, or the first floating tensor of a tuple.
        class_dim: Dimension of the classes. Default: 1 for outputs with four dimensions or more, else the
            last one.

    Raises:
        ConfigError: The teacher is the model itself, a linked module does not exist, a setting is not valid.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]] | None = None,
        *,
        teacher: nn.Module,
        temperature: float | Schedule = 4.0,
        logits_weight: float | Schedule = 0.9,
        logits: Callable[[Any], Any] = logits_of,
        class_dim: int | None = None,
    ):
        for name, value in (("model", model), ("teacher", teacher)):
            if not isinstance(value, nn.Module):
                raise ConfigError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
        if teacher is model:
            raise ConfigError("the teacher is the model itself; give a copy: teacher=copy.deepcopy(model)")
        _check_number("temperature", temperature, positive=True)
        _check_number("logits_weight", logits_weight, positive=False)
        self.model, self.teacher = model, teacher
        self.temperature, self.logits_weight = temperature, logits_weight
        self.steps = 0
        self.links = resolve_links(model, teacher, config_list) if config_list else ()
        if not self.links and logits_weight == 0:
            raise ConfigError("nothing to distil: logits_weight is 0 and config_list is empty")
        self._logits, self._class_dim = logits, class_dim
        self._call = CallRecorder()
        self._student = TargetRecorder([(link.module, link.target) for link in self.links], "student")
        self._teacher = TargetRecorder(
            [(name, link.target) for link in self.links for name in link.teacher_modules], "teacher"
        )
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the recording hooks on the model; they change nothing that flows. Twice is once."""
        if not self._handles:
            self._handles = [
                *self._call.attach(self.model),
                *self._student.attach(self.model, only_with_gradients=True),
            ]

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def step(self) -> None:
        """Count an optimizer step, for schedules."""
        self.steps += 1

    def parameters(self) -> Iterator[nn.Parameter]:
        """Nothing of a distiller is trained."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """Return the step number."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the step number."""
        self.steps = int(state["steps"])

    def loss(self) -> Tensor:
        """Return the loss of the last forward pass of the model, a 0-d tensor; each pass counts once.

        Raises:
            DwindleError: The model was not called (with gradients) since the last ``loss()``.
            ConfigError: Shapes of student and teacher differ, or an input was changed in place.
        """
        if not self.attached:
            raise DwindleError("the distiller is not attached; use it in `with compress(model, [distiller])`")
        if not self._call.complete:
            raise DwindleError(
                "distiller.loss() needs a forward pass of the model with gradients since the last loss()"
            )
        self._call.check_inputs_unchanged()
        try:
            taught = self._ask_teacher()
            terms = []
            weight = value_at(self.logits_weight, self.steps)
            if weight:
                terms.append(weight * self._logits_loss(taught))
            terms.extend(link.weight * self._link_loss(link) for link in self.links)
            return torch.stack(terms).sum() if terms else self._zero()
        finally:
            self._forget()

    def _ask_teacher(self) -> Any:
        """Run the teacher on the recorded inputs, under the autocast setting the model ran under."""
        handles = self._teacher.attach(self.teacher, only_with_gradients=False)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(modes_kept(self.teacher))
                self.teacher.eval()
                stack.enter_context(torch.no_grad())
                for device, dtype in self._call.autocast.items():
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
                return self.teacher(*self._call.args, **self._call.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _logits_loss(self, taught: Any) -> Tensor:
        student, teacher = self._logits(self._call.output), self._logits(taught)
        for role, value in (("model", student), ("teacher", teacher)):
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"no logits in the {role}'s output, a {type(value).__name__}; "
                    "say where they are with logits=function, or set logits_weight=0"
                )
        dim = class_dimension(student) if self._class_dim is None else self._class_dim
        return divergence(student, teacher, value_at(self.temperature, self.steps), dim)

    def _link_loss(self, link: FeatureLink) -> Tensor:
        """The smallest distance over the linked teacher modules; calls of a module used twice are paired."""
        calls = self._student.values.get((link.module, link.target), [])
        candidates = []
        for name in link.teacher_modules:
            taught = self._teacher.values.get((name, link.target), [])
            if len(calls) != len(taught) or not calls:
                raise ConfigError(
                    f"module {link.module!r} was called {len(calls)} times in the model, and {name!r} "
                    f"{len(taught)} times in the teacher; they cannot be paired"
                )
            try:
                terms = [
                    feature_loss(link.method, mine, theirs)
                    for mine, theirs in zip(calls, taught, strict=True)
                ]
            except ConfigError as error:
                raise ConfigError(
                    f"{link.module}.{link.target} cannot be compared with the teacher's {name!r}: {error}"
                ) from error
            candidates.append(torch.stack(terms).mean())
        return torch.stack(candidates).min()

    def _zero(self) -> Tensor:
        output = self._logits(self._call.output)
        return output.sum() * 0.0 if isinstance(output, Tensor) else torch.zeros(())

    def _forget(self) -> None:
        self._call.clear()
        self._student.clear()
        self._teacher.clear()


def resolve_links(
    model: nn.Module, teacher: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> tuple[FeatureLink, ...]:
    """Turn a config_list of kind ``distillation`` into links, in the order of the model's modules.

    Raises:
        ConfigError: An entry is not valid, or a linked module does not exist in the teacher.
    """
    teacher_names = dict(teacher.named_modules())
    links = []
    for target, setting in resolve(model, config_list, "distillation").items():
        if target.is_parameter:
            raise ConfigError(f"{target.path}: only inputs and outputs can be distilled, not parameters")
        names = _link_names(setting.link, target.module)
        for name in names:
            if name not in teacher_names:
                raise ConfigError(
                    f"{target.path}: the teacher has no module {name!r}{did_you_mean(name, teacher_names)}"
                )
        method = setting.apply_method or "mse"
        if method not in FEATURE_LOSSES:
            raise ConfigError(
                f"{target.path}: apply_method {method!r} is not one of {', '.join(FEATURE_LOSSES)}"
            )
        weight = setting.lambda_
        links.append(
            FeatureLink(target.module, target.name, names, 1.0 if weight is None else float(weight), method)
        )
    return tuple(links)


def _link_names(link: Any, own_name: str) -> tuple[str, ...]:
    """``None`` and ``"auto"`` mean the teacher's module of the same name."""
    entries = (link,) if link is None or isinstance(link, str) else tuple(link)
    return tuple(own_name if entry in (None, "auto") else str(entry) for entry in entries) or (own_name,)


def _check_number(name: str, value: object, *, positive: bool) -> None:
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number or a schedule, got {type(value).__name__}")
    if value < 0 or (positive and value == 0):
        raise ConfigError(f"{name} must be {'above 0' if positive else '0 or more'}, got {value}")
