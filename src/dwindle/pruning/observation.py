"""Pruners that watch the model at work: statistics of activations or gradients, streamed over batches.

Nothing of a batch is kept: each statistic is one running sum a target. The sums are added up over all processes
before they are used, so every rank of a distributed run finds the same masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.base import Pruner
from dwindle.pruning.statistics import Statistics, agree
from dwindle.training.inputs import batches_of, forward_inputs
from dwindle.training.model_pass import batches_for, device_of, statistics_of_batches, task_loss, undisturbed

#: The task's loss: ``loss(outputs, target)`` gives a 0-d tensor.
Loss = Callable[[Any, Any], Tensor]


class ObservingPruner(Pruner):
    """Base of pruners whose metric comes from the model at work.

    They are used in one of three ways: alone with ``data`` (``compress()`` runs the model over it, in evaluation
    mode); in a training run with ``training_steps`` (the user's own batches are watched, and the masks come after
    so many optimizer steps); or under a schedule, which renews the masks from what was seen since the last time.

    A subclass attaches hooks in :meth:`watch` or reads gradients in :meth:`gradients`, adds what it sees with
    :meth:`add`, and makes its metric from :meth:`mean`.

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        data: Batches, or one tensor. Where gradients are needed they are ``(inputs, target)`` or mappings with
            ``labels``.
        loss: ``loss(outputs, target)``; outputs are logits (``.logits`` where a model gives an output object).
        batches: How many batches of ``data`` are used; None takes all. When ``data`` ends earlier, that is an error.
        adapt: Applied to each batch first.
        training_steps: Optimizer steps of a training run that are watched before the masks come.

    Raises:
        ConfigError: An argument is not valid.
    """

    #: Whether the loss is needed and its gradients are read.
    needs_gradients: bool = False
    #: Whether the own pass over ``data`` normalizes with the statistics of each batch (for untrained models, whose
    #: running statistics mean nothing); the running statistics are as before afterwards.
    batch_statistics: bool = False
    #: Whether there is anything to observe at all.
    needs_observation: bool = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        data: Any = None,
        loss: Loss = nn.functional.cross_entropy,
        batches: int | None = None,
        adapt: Callable[[Any], Any] | None = None,
        training_steps: int | None = None,
    ) -> None:
        super().__init__(model, config_list, example_inputs, example_kwargs)
        for name, number in {"batches": batches, "training_steps": training_steps}.items():
            if number is not None and (isinstance(number, bool) or number < 1):
                raise ConfigError(f"{name}: {number!r} is not a positive number")
        if data is not None and training_steps is not None:
            raise ConfigError("give data, or training_steps for statistics from a training run; not both")
        self.data: Iterable[Any] | None = None if data is None else batches_of(data)
        self.loss_function, self.batches_wanted, self.adapt = loss, batches, adapt
        self.training_steps = training_steps
        self.steps = 0
        self.statistics = Statistics()
        self.batches_seen = 0
        self._stale = False
        self._own_pass = False
        self._stopped = False
        self._handles: list[Any] = []
        self._optimized: set[int] | None = None

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        if self.data is not None and not self._stands:
            return "with data= it runs the model by itself; compress() before fully_shard, or watch training_steps="
        return super().sharding_problem()

    # What a subclass writes.

    def analysed(self) -> None:
        """Called once the model is analysed and before it is observed; by default nothing."""

    def watch(self) -> Iterator[RemovableHandle]:
        """Attach hooks that call :meth:`add`, and yield them; by default there are none."""
        yield from ()

    def gradients(self) -> None:
        """Read gradients with :meth:`gradient_of`, complete and before the optimizer uses them; by default nothing."""

    # What a subclass uses.

    @property
    def observing(self) -> bool:
        """Whether what runs now counts: the own pass over ``data``, or a training step (no evaluation)."""
        return self._own_pass or self.model.training

    def add(self, target: Target, value: Tensor, count: float = 1.0) -> None:
        """Add to the sum of a target (in float32 at least); in an evaluation between training steps do nothing.

        Args:
            target: Which target it belongs to.
            value: The sum over ``count`` observations; any shape, always the same for one target.
            count: How many observations it stands for: of means over samples, tokens or pixels their number.
        """
        if self.observing:
            self._renew()
            self.statistics.add(target, value, count)

    def mean(self, target: Target) -> Tensor:
        """Return the mean of what was added for a target.

        Raises:
            DwindleError: Nothing was added: the module was never called, or its parameter has no gradient.
        """
        if target not in self.statistics:
            raise DwindleError(
                f"{target}: {type(self).__name__} saw nothing of it in {self.batches_seen} batches; is its module "
                "used by the forward, and does the parameter require a gradient?"
            )
        return self.statistics.mean(target)

    def gradient_of(self, target: Target) -> Tensor | None:
        """Return the gradient of a parameter that is ready: in the own pass, or for the optimizer about to step."""
        parameter = self.model.get_submodule(target.module)._parameters.get(target.name)
        if parameter is None or parameter.grad is None:
            return None
        if self._optimized is not None and id(parameter) not in self._optimized:
            return None  # another optimizer's; its gradient may be half done
        gradient = simulate.whole(parameter.grad)
        return gradient.to_dense() if gradient.is_sparse else gradient

    # The way through.

    def compress(self, progress: float = 1.0) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Run the model over the data, then mask it in place.

        Args:
            progress: As in :meth:`Pruner.compress`. With 0 and without data the model is watched from now on.

        Returns:
            The model and its masks, ``{module: {target: mask}}``.

        Raises:
            ConfigError: There is no data, it ends early, or it was called before.
            DwindleError: The statistics are not finite. In all cases the model is as it was.
        """
        if self.needs_observation and self.data is None and progress > 0:
            raise ConfigError(
                f"{type(self).__name__} needs data=, or training_steps= and a training run: "
                "with dw.compress(model, [pruner]) as run: ..."
            )
        return super().compress(progress)

    def prepare(self) -> None:
        """Analyse the model, then run it over the data, or watch it from now on."""
        super().prepare()
        self.analysed()
        if self.data is not None:
            self.observe()
        elif self.needs_observation and not self._finished:
            self._watch()

    def observe(self) -> None:
        """Run the model over the data in evaluation mode; values, gradients and flags are as before afterwards.

        Raises:
            ConfigError: The data ends before ``batches``.
            DwindleError: A loss or a statistic is not finite, or another process failed.
        """
        if self.data is None:
            raise ConfigError(f"{type(self).__name__} has no data to observe")
        self._stale = True
        self._renew()
        agree(self._run_over, self._device)

    def _run_over(self) -> None:
        with self._pass():
            for batch in batches_for(self.data, self.batches_wanted, f"{type(self).__name__}: data"):
                self.forward(batch if self.adapt is None else self.adapt(batch))
                self.batches_seen += 1

    def forward(self, batch: Any) -> None:
        """Run the model on one batch of ``data``, with gradients where they are needed.

        Raises:
            DwindleError: The loss is not finite.
        """
        if not self.needs_gradients:
            args, kwargs = forward_inputs(self.model, batch)
            with torch.no_grad():
                self.model(*args, **kwargs)
            return
        with torch.enable_grad():
            self.loss_of(batch).backward()  # type: ignore[no-untyped-call]
        self.gradients()
        for parameter in self.model.parameters():
            parameter.grad = None

    def loss_of(self, batch: Any) -> Tensor:
        """Return the task's loss of one batch, a 0-d tensor.

        Raises:
            DwindleError: It is not finite.
        """
        return task_loss(self.model, batch, self.loss_function, self.batches_seen + 1)

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    @contextlib.contextmanager
    def _pass(self) -> Iterator[None]:
        """Evaluation mode, the subclass's hooks, and afterwards everything of the user's as it was."""
        owners = [(self.model.get_submodule(target.module), target.name) for target in self.plan.goals]
        ranked = [own for module, name in owners if (own := module._parameters[name]) is not None]
        with contextlib.ExitStack() as stack:
            stack.enter_context(undisturbed(self.model, ranked if self.needs_gradients else ()))
            if self.batch_statistics:
                stack.enter_context(statistics_of_batches(self.model))
            self._own_pass = True
            stack.callback(setattr, self, "_own_pass", False)
            for handle in self.watch():
                stack.callback(handle.remove)
            yield

    def _watch(self) -> None:
        """Watch a training run from now on: the hooks, and the gradients that an optimizer is about to use."""
        if self._handles:
            return
        self._handles.extend(self.watch())
        if self.needs_gradients:
            self._handles.append(register_optimizer_step_pre_hook(self._before_optimizer))
        if not self._handles:
            raise ConfigError(f"{type(self).__name__} watches nothing of a training run; give data=")

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        try:
            if any(id(parameter) in self._optimized for parameter in self.model.parameters()):
                self.gradients()
        finally:
            self._optimized = None

    def stop_watching(self) -> None:
        """Watch the training run no longer; the masks stay as they are."""
        self._stopped = True
        self._unwatch()

    def rest(self) -> None:
        """Watch the training run no longer (:class:`dwindle.training.Staged` calls this)."""
        self.stop_watching()

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _renew(self) -> None:
        """Forget what the last masks were made of."""
        if self._stale:
            self._stale = False
            self.statistics.clear()
            self.batches_seen = 0

    def _mask(self, progress: float) -> None:
        if progress == 0 and self.needs_observation and self.data is None and not self._attached:
            self._progress = progress
            return  # nothing goes yet, and what was seen so far stays
        if not self._stale:
            self.statistics.reduce(self._device)
            self._stale = True  # from here on they are everyone's; the next observation begins anew
        self._check_finite()
        super()._mask(progress)

    def _check_finite(self) -> None:
        bad = self.statistics.not_finite()
        if bad:
            listed = ", ".join(map(str, bad[:3]))
            raise DwindleError(
                f"{listed}: the statistics of {type(self).__name__} are not finite; do the data or the weights "
                "hold NaN or infinite values?"
            )

    def update(self, progress: float) -> None:
        """Renew the masks from what was seen since the last time (or, when nothing was, from the same statistics).

        With ``data`` the model is run over it again, as it is now.

        Args:
            progress: As in :meth:`Pruner.update`.

        Raises:
            ConfigError: ``compress()`` was not called, or the number is not between 0 and 1.
            DwindleError: The statistics are not finite; the masks stay as they were.
        """
        if self._compressed and self.data is not None:
            self.observe()
        super().update(progress)

    def step(self) -> None:
        """The optimizer has made one step; after ``training_steps`` of them the masks come."""
        if not self._handles:
            return  # the masks are made: from data, or from the steps before
        self.steps += 1
        if not self._stale:
            self.batches_seen += 1
        if self.training_steps is not None and self.steps == self.training_steps:
            self.update(1.0)
            self._unwatch()

    @property
    def _finished(self) -> bool:
        """Whether a training run has been watched to its end."""
        return self._stopped or (self.training_steps is not None and self.steps >= self.training_steps)

    def attach(self) -> None:
        """Mask the model from the data, or begin to watch the training run.

        Raises:
            ConfigError: There is neither data nor ``training_steps``.
        """
        if self.needs_observation and self.data is None and not self._compressed:
            if self.training_steps is None:
                raise ConfigError(
                    f"{type(self).__name__} needs data= or training_steps=, or a schedule around it"
                )
            self.compress(0.0)
            return
        super().attach()
        if self.needs_observation and self.data is None and not self._finished:
            self._watch()  # after detach() it goes on where it was

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Stop watching, and take the masks off as :meth:`Pruner.detach` does."""
        self._unwatch()
        return super().detach(keep_values=keep_values)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, the running sums included."""
        own = {"steps": self.steps, "batches_seen": self.batches_seen, "stale": self._stale}
        return {**super().state_dict(), **own, "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "batches_seen", "stale", "statistics"} - set(state)
        if missing:
            raise ConfigError(f"the state of {type(self).__name__} needs {', '.join(sorted(missing))}")
        super().load_state_dict(state)
        self.steps, self.batches_seen = int(state["steps"]), int(state["batches_seen"])
        self._stale = bool(state["stale"])
        self.statistics.load_state_dict(state["statistics"], self._device)
        if self._finished:
            self._unwatch()
