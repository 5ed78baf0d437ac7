"""The distiller: a compressor whose loss pulls a model towards a teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.distillation.cache import TeacherCache
from dwindle.distillation.linking import LinkLosses
from dwindle.distillation.links import FeatureLink, Inputs, resolve_links
from dwindle.distillation.losses import class_dimension
from dwindle.distillation.methods import logits_loss as checked_logits_loss
from dwindle.distillation.moving_teacher import MovingTeacher
from dwindle.distillation.recording import CallRecorder, TargetRecorder
from dwindle.distillation.teacher import Taught, ask_teacher, shares_tensors
from dwindle.training.batches import logits_of
from dwindle.training.inputs import forward_inputs
from dwindle.training.schedule import Schedule, value_at

__all__ = ["Distiller"]

OWN_TEACHERS = ("ema", "self")


class Distiller:
    """Pull a model towards a teacher while it is trained.

    ``loss()`` is ``logits_weight`` times the distance of the outputs of the last training forward pass, plus, for every
    target of ``config_list``, ``lambda`` times the distance to the nearest linked teacher module. The teacher sees the
    very inputs the model saw: they are recorded by hooks, and nothing is asked of the training loop. It runs in
    evaluation mode and in inference mode, once per ``loss()``, and is left exactly as it is.

    Hinton et al., https://arxiv.org/abs/1503.02531. The usual mixture with the task's loss is
    ``(1 - logits_weight) * task + run.loss()``.

    Args:
        model: The student.
        config_list: Pairs of intermediate tensors, see ``dwindle.config`` (kind ``distillation``): keys
            ``lambda``, ``link`` (``"auto"``: the module that corresponds), ``apply_method`` and ``options``.
        teacher: The model to learn from, such as a ``copy.deepcopy`` of the model before pruning; ``"ema"``: the moving
            average of the model itself (mean teacher); ``"self"``: other modules of the model itself, as the links
            name them (Zhang et al., "Be Your Own Teacher", https://arxiv.org/abs/1905.08094; needs
            ``logits_weight=0``).
        temperature: Softens both distributions; a number above 0, or a schedule over steps.
        logits_weight: Weight of the outputs' loss, a number or a schedule; 0 leaves the outputs out.
        logits_loss: ``kl`` (Hinton's), ``binary`` (each logit a yes or no of its own), ``dkd`` or ``dist``.
        logits_options: Its options, numbers or schedules.
        logits: ``logits(outputs) -> tensor`` for models whose outputs hold their logits in an unusual place.
            Default: the tensor itself, ``.logits``, or the first floating tensor of a tuple.
        class_dim: Dimension of the classes. Default: 1 for outputs with four dimensions or more, else the
            last one.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword inputs. Both models run once with them:
            modules are matched by shape, projections are made where shapes differ, and pairs that cannot be compared
            are errors at once.
        ema_decay: Of the moving average, 0 to 1, a number or a schedule.
        cache: Keep the teacher's answers in this directory (:class:`TeacherCache`), for data without augmentation.
        seed: Of the first weights of learned projections; the same in all processes.

    Attributes:
        links: What is compared with what.
        steps: Optimizer steps so far.
        projects_last_dimension: Whether ``mse`` and ``kl`` get a learned linear layer where the last dimensions differ.

    Raises:
        ConfigError: The teacher is the model itself, a linked module does not exist, a setting is not valid.
    """

    projects_last_dimension: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]] | None = None,
        *,
        teacher: nn.Module | str,
        temperature: float | Schedule = 4.0,
        logits_weight: float | Schedule = 0.9,
        logits_loss: str = "kl",
        logits_options: Mapping[str, Any] | None = None,
        logits: Callable[[Any], Any] = logits_of,
        class_dim: int | None = None,
        example_inputs: Any | None = None,
        ema_decay: float | Schedule = 0.999,
        cache: str | os.PathLike[str] | TeacherCache | None = None,
        seed: int = 0,
    ):
        _check_models(model, teacher)
        _check_number("temperature", temperature, positive=True)
        _check_number("logits_weight", logits_weight, positive=False)
        self.temperature, self.logits_weight = temperature, logits_weight
        self._loss = checked_logits_loss(logits_loss, temperature, logits_options)
        self._kind = teacher if isinstance(teacher, str) else "given"
        self._check_kind(cache, config_list)
        self.model, self.steps = model, 0
        self._moving = MovingTeacher(model, ema_decay) if self._kind == "ema" else None
        self.teacher = self._teacher_module(teacher)
        inputs = _inputs_of(model, example_inputs)
        links = resolve_links(model, self.teacher, config_list, inputs) if config_list else ()
        if not links and logits_weight == 0:
            raise ConfigError("nothing to distil: logits_weight is 0 and config_list is empty")
        self._logits, self._class_dim, self._seed = logits, class_dim, seed
        self._cache = TeacherCache(cache) if isinstance(cache, str | os.PathLike) else cache
        self._call = CallRecorder()
        self._handles: list[RemovableHandle] = []
        self._inference = False
        self._link(links, inputs)

    def _teacher_module(self, teacher: nn.Module | str) -> nn.Module:
        if self._moving is not None:
            return self._moving.module
        return self.model if isinstance(teacher, str) else teacher

    def _check_kind(self, cache: Any, config_list: Any) -> None:
        if self._kind == "given":
            return
        if cache is not None:
            raise ConfigError(
                f"cache: what teacher={self._kind!r} says changes with every step; nothing can be kept"
            )
        if self._kind == "self" and (self.logits_weight != 0 or not config_list):
            raise ConfigError(
                "teacher='self' compares modules of one model: name them in config_list with 'link', and set "
                "logits_weight=0"
            )

    def _link(self, links: Sequence[FeatureLink], inputs: Inputs | None) -> None:
        """Take over links, and what is recorded for them."""
        for link in links:
            if self._kind == "self" and link.module in link.teacher_modules:
                raise ConfigError(
                    f"{link.module}.{link.target}: teacher='self' needs a 'link' to another module of the model"
                )
        self._losses = LinkLosses(
            links, self.model, self.teacher, inputs, self._seed, last_dimension=self.projects_last_dimension
        )
        self._losses.check_ready()
        own = self._losses.teacher_targets if self._kind == "self" else []
        self._student = TargetRecorder([*self._losses.student_targets, *own], "student")
        self._teacher = TargetRecorder(self._losses.teacher_targets, "teacher")

    @property
    def links(self) -> tuple[FeatureLink, ...]:
        """What is compared with what, in the order of the model's modules."""
        return self._losses.links

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def summary(self) -> str:
        """Return what is compared with what as a table: modules, methods, weights, how they were matched, shapes."""
        return self._losses.summary()

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        return "teacher='ema' is a copy of the whole model" if self._moving is not None else None

    def attach(self) -> None:
        """Put the recording hooks on the model; they change nothing that flows. Twice is once."""
        if self._handles:
            return
        self._handles = [
            *self._call.attach(self.model),
            *self._student.attach(self.model, only_with_gradients=True),
        ]
        self._inference = not shares_tensors(self.model, self.teacher)

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def rest(self) -> None:
        """Take the hooks off: nothing is compared any more."""
        self.detach()

    def step(self) -> None:
        """Count an optimizer step, for schedules; a moving average moves."""
        self.steps += 1
        if self._moving is not None:
            self._moving.follow(self.steps)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The learned projections, for ``run.add_parameters_to(optimizer)``; nothing without any."""
        return self._losses.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the step number, the learned projections and the moving average."""
        state: dict[str, Any] = {"steps": self.steps, "adapters": self._losses.state_dict()}
        if self._moving is not None:
            state["teacher"] = self._moving.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: It is that of another distiller.
        """
        if (self._moving is not None) is not ("teacher" in state):
            raise ConfigError("the state was saved by a distiller with another kind of teacher")
        self._losses.load_state_dict(state.get("adapters", {}))
        if self._moving is not None:
            self._moving.load_state_dict(state["teacher"])
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
            taught = self._ask()
            terms = []
            weight = value_at(self.logits_weight, self.steps)
            if weight:
                terms.append(weight * self._logits_loss(taught))
            mine, theirs = self._student.values, taught.features
            terms.extend(self._losses.loss(link, mine, theirs, self.steps) for link in self.links)
            return torch.stack(terms).sum() if terms else self._zero()
        finally:
            self._forget()

    def _ask(self) -> Taught:
        """What the teacher says to the recorded inputs."""
        inputs = (self._call.args, self._call.kwargs)
        if self._kind == "self":
            own = self._student.values
            return Taught(None, {key: [value.detach() for value in calls] for key, calls in own.items()})
        if self._cache is None:
            return self._ask_with(inputs)
        question = repr((self._teacher.targets, self._finds_logits(), sorted(self._call.autocast.items())))
        return self._cache.answer(self.teacher, question, inputs, self._teacher.targets, self._ask_with)

    def _ask_with(self, inputs: Inputs) -> Taught:
        logits = self._logits if self._finds_logits() else None
        return ask_teacher(
            self.teacher, self._teacher, self._predict, logits, self._call, inputs, inference=self._inference
        )

    def _predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the teacher; a subclass may run it in another way."""
        return self.teacher(*args, **kwargs)

    def _finds_logits(self) -> str:
        """Name of the function that finds the logits; empty when the outputs are left out for good."""
        if self.logits_weight == 0 and not callable(self.logits_weight):
            return ""
        return getattr(self._logits, "__qualname__", type(self._logits).__qualname__)

    def _logits_loss(self, taught: Taught) -> Tensor:
        student, teacher = self._logits(self._call.output), taught.logits
        for role, value in (("model", student), ("teacher", teacher)):
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"no logits in the {role}'s output, a {type(value).__name__}; "
                    "say where they are with logits=function, or set logits_weight=0"
                )
        dim = class_dimension(student) if self._class_dim is None else self._class_dim
        return self._loss(student, teacher, dim, self.steps)

    def _zero(self) -> Tensor:
        output = self._logits(self._call.output)
        return output.sum() * 0.0 if isinstance(output, Tensor) else torch.zeros(())

    def _forget(self) -> None:
        self._call.clear()
        self._student.clear()
        self._teacher.clear()


def _check_models(model: Any, teacher: Any) -> None:
    if isinstance(teacher, str) and teacher not in OWN_TEACHERS:
        raise ConfigError(
            f"teacher must be a torch.nn.Module, 'ema' or 'self', got {teacher!r}{did_you_mean(teacher, OWN_TEACHERS)}"
        )
    for name, value in (("model", model), ("teacher", teacher)):
        if not isinstance(value, nn.Module) and not (name == "teacher" and isinstance(value, str)):
            raise ConfigError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    if teacher is model:
        raise ConfigError("the teacher is the model itself; give a copy: teacher=copy.deepcopy(model)")


def _inputs_of(model: nn.Module, example_inputs: Any | None) -> Inputs | None:
    return None if example_inputs is None else forward_inputs(model, example_inputs, lambda batch: batch)


def _check_number(name: str, value: object, *, positive: bool) -> None:
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number or a schedule, got {type(value).__name__}")
    if value < 0 or (positive and value == 0):
        raise ConfigError(f"{name} must be {'above 0' if positive else '0 or more'}, got {value}")
