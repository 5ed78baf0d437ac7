"""Pruners that watch the model at work: statistics of activations or gradients, streamed over batches.

Nothing of a batch is kept: each statistic is one running sum a target. The sums are added up over all processes
before they are used, so every rank of a distributed run finds the same masks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.base import Pruner
from dwindle.training.batches import logits_of, move_batch, split_batch
from dwindle.training.inputs import batches_of, forward_inputs
from dwindle.training.processes import sum_over_processes

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
    needs_gradients: ClassVar[bool] = False

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
        self.sums: dict[Target, Tensor] = {}
        self.batches_seen = 0
        self._stale = False
        self._own_pass = False
        self._handles: list[Any] = []

    # What a subclass writes.

    def watch(self) -> Iterator[RemovableHandle]:
        """Attach hooks that call :meth:`add`, and yield them; by default there are none."""
        yield from ()

    def gradients(self) -> None:
        """Read ``.grad`` of parameters, complete and before the optimizer uses them; by default nothing."""

    # What a subclass uses.

    def add(self, target: Target, value: Tensor) -> None:
        """Add the value of one batch to the sum of a target (in float32 at least).

        Args:
            target: Which target it belongs to.
            value: Any shape, always the same for one target.
        """
        if not self._own_pass and not self.model.training:
            return  # an evaluation between the steps of a training run
        value = value.detach()
        if not value.is_floating_point() or value.dtype.itemsize < 4:
            value = value.float()
        self._renew()
        if target in self.sums:
            self.sums[target] += value
        else:
            self.sums[target] = value.clone()

    def mean(self, target: Target) -> Tensor:
        """Return the mean over batches of what was added for a target.

        Raises:
            DwindleError: Nothing was added: the module was never called, or its parameter has no gradient.
        """
        if target not in self.sums:
            raise DwindleError(
                f"{target}: {type(self).__name__} saw nothing of it in {self.batches_seen} batches; is its module "
                "used by the forward, and does the parameter require a gradient?"
            )
        return self.sums[target] / max(self.batches_seen, 1)

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
        if self.data is None and progress > 0:
            raise ConfigError(
                f"{type(self).__name__} needs data=, or training_steps= and a training run: "
                "with dw.compress(model, [pruner]) as run: ..."
            )
        return super().compress(progress)

    def prepare(self) -> None:
        """Analyse the model, then run it over the data, or watch it from now on."""
        super().prepare()
        if self.data is None:
            self._watch()
        else:
            self.observe()

    def observe(self) -> None:
        """Run the model over the data in evaluation mode; values, gradients and flags are as before afterwards.

        Raises:
            ConfigError: The data ends before ``batches``.
            DwindleError: A loss or a statistic is not finite.
        """
        if self.data is None:
            raise ConfigError(f"{type(self).__name__} has no data to observe")
        self._stale = True
        self._renew()
        with self._pass():
            for batch in itertools.islice(self.data, self.batches_wanted):
                self._forward(batch if self.adapt is None else self.adapt(batch))
                self.batches_seen += 1
        if self.batches_seen < (self.batches_wanted or 1):
            raise ConfigError(
                f"data ended after {self.batches_seen} of {self.batches_wanted or 'its'} batches"
            )

    def _forward(self, batch: Any) -> None:
        if not self.needs_gradients:
            args, kwargs = forward_inputs(self.model, batch)
            with torch.no_grad():
                self.model(*args, **kwargs)
            return
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        args, kwargs, target = split_batch(move_batch(batch, device))
        with torch.enable_grad():
            loss = self.loss_function(logits_of(self.model(*args, **kwargs)), target)
            if not math.isfinite(float(loss.detach())):
                raise DwindleError(f"the loss of batch {self.batches_seen + 1} is {float(loss.detach())}")
            loss.backward()  # type: ignore[no-untyped-call]
        self.gradients()
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def _pass(self) -> Iterator[None]:
        """Evaluation mode, the subclass's hooks, and afterwards everything of the user's as it was."""
        flags = [(module, module.training) for module in self.model.modules()]
        saved = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        handles: list[RemovableHandle] = []
        try:
            self.model.eval()
            for parameter, _ in saved:
                parameter.grad = None
            self._own_pass = True
            handles.extend(self.watch())
            yield
        finally:
            self._own_pass = False
            for handle in handles:
                handle.remove()
            for parameter, gradient in saved:
                parameter.grad = gradient
            for module, training in flags:
                module.training = training

    def _watch(self) -> None:
        """Watch a training run from now on: the hooks, and the gradients that an optimizer is about to use."""
        if self._handles:
            return
        self._handles.extend(self.watch())
        if self.needs_gradients:
            self._handles.append(register_optimizer_step_pre_hook(self._before_optimizer))

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in own for parameter in self.model.parameters()):
            self.gradients()

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _renew(self) -> None:
        """Forget what the last masks were made of."""
        if self._stale:
            self._stale = False
            self.sums.clear()
            self.batches_seen = 0

    def _mask(self, progress: float) -> None:
        if not self.batches_seen and not self.sums and progress == 0:
            self._progress = progress
            return  # nothing was seen yet and nothing goes
        if not self._stale:
            self._reduce()
        super()._mask(progress)
        self._stale = True

    def _reduce(self) -> None:
        """Add the sums up over all processes, and refuse what is not finite."""
        count = torch.tensor([float(self.batches_seen)])
        order = sorted(self.sums, key=str)
        sum_over_processes([count, *(self.sums[target] for target in order)])
        self.batches_seen = int(count)
        for target in order:
            if not bool(torch.isfinite(self.sums[target]).all()):
                raise DwindleError(
                    f"{target}: the statistics of {type(self).__name__} are not finite; do the data or the weights "
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

    def attach(self) -> None:
        """Mask the model from the data, or begin to watch the training run.

        Raises:
            ConfigError: There is neither data nor ``training_steps``.
        """
        if self.data is None and not self._compressed:
            if self.training_steps is None:
                raise ConfigError(
                    f"{type(self).__name__} needs data= or training_steps=, or a schedule around it"
                )
            self.compress(0.0)
            return
        super().attach()

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Stop watching, and take the masks off as :meth:`Pruner.detach` does."""
        self._unwatch()
        return super().detach(keep_values=keep_values)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, the running sums included."""
        sums = {str(target): value for target, value in self.sums.items()}
        own = {"steps": self.steps, "batches_seen": self.batches_seen, "stale": self._stale, "sums": sums}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        super().load_state_dict(state)
        missing = {"steps", "batches_seen", "stale", "sums"} - set(state)
        if missing:
            raise ConfigError(f"the state of {type(self).__name__} needs {', '.join(sorted(missing))}")
        self.steps, self.batches_seen = int(state["steps"]), int(state["batches_seen"])
        self._stale = bool(state["stale"])
        self.sums = {Target.parse(path): value for path, value in state["sums"].items()}
        if self.training_steps is not None and self.steps >= self.training_steps:
            self._unwatch()
