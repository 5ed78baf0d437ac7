"""Base of pruners that act all through a training run: trained scores, penalties, masks that move."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning.base import Pruner
from dwindle.pruning.plan import PlannedTarget
from dwindle.training.processes import share_from_first

#: After so many steps of a schedule, scores that never moved are an error.
_PATIENCE = 10


class TrainingPruner(Pruner):
    """Base of pruners that are part of a training run from its first step on.

    ``with dw.compress(model, [pruner]) as run`` attaches it; ``run.loss()`` adds its penalty, and
    ``run.add_parameters_to(optimizer)`` has its scores trained (:func:`dwindle.training.fit` does that by itself).
    After ``training_steps`` optimizer steps the masks stand, exactly as the config_list asks; what follows in the
    same run is fine-tuning.

    A subclass gives targets a simulator (:meth:`make_simulator`), a penalty (:meth:`penalty`), and renews what
    moves (:meth:`advance`).

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        training_steps: Optimizer steps until the masks stand.
        learning_rate: Of the scores; None takes that of the user's optimizer. They get no weight decay.

    Raises:
        ConfigError: An argument is not valid.
    """

    #: Progress at the first step.
    first_progress = 0.0

    #: Where the simulators of :meth:`make_simulator` act: ``mask`` or ``gate``.
    stage = "mask"

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(model, config_list, example_inputs, example_kwargs)
        self.training_steps = whole_number("training_steps", training_steps, at_least=1)
        if learning_rate is not None and not learning_rate > 0:
            raise ConfigError(f"learning_rate: {learning_rate!r} is not a positive number")
        self.learning_rate = learning_rate
        self.steps = 0
        self.finished = False
        self.simulators: dict[Target, nn.Module] = {}
        self._fingerprint: list[float] | None = None
        self._replaced: dict[Target, simulate.MaskSimulator] = {}
        self._final: list[tuple[Target, Tensor, str, int | None]] | None = None

    works_sharded = False

    @property
    def _stands(self) -> bool:
        return self.finished

    # What a subclass writes.

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module | None:
        """Return what sits on a ranked target during training; None is a plain mask (or nothing, at ``gate``).

        Args:
            planned: The target.
            weight: Its parameter, without gradient.
        """
        return None

    def penalty(self) -> Tensor | float:
        """What is added to the loss until the masks stand."""
        return 0.0

    def advance(self) -> None:
        """The optimizer has made step number ``self.steps`` and there are more to come before the end."""

    def freeze(self) -> None:
        """The masks stand: scores have no part in them any more."""
        for simulator in self.simulators.values():
            if isinstance(simulator, simulate.ScoredMask):
                simulator.frozen = True

    # The way through.

    def compress(self, progress: float | None = None) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Begin: attach everything to the model; the masks move with :meth:`step`.

        Args:
            progress: Where to begin; None is the beginning of this pruner.

        Returns:
            The model and its masks, ``{module: {target: mask}}``.

        Raises:
            ConfigError: It was called before, or ``progress`` is not between 0 and 1.
            CaptureError: The model fails on the example inputs; it was not touched.
        """
        try:
            return super().compress(self.first_progress if progress is None else progress)
        except BaseException:
            if not self._compressed:
                self._withdraw()
            raise

    def prepare(self) -> None:
        """Analyse the model, then give every ranked target its simulator."""
        super().prepare()
        modules = dict(self.model.named_modules())
        for target, planned in self.plan.goals.items():
            parameter = modules[target.module]._parameters[target.name]
            if parameter is None:
                raise ConfigError(f"{target} is no longer there")
            made = self.make_simulator(planned, simulate.whole(parameter))
            if made is not None:
                self.simulators[target] = made
        self._register()

    def _register(self) -> None:
        for target, simulator in self.simulators.items():
            there = simulate.simulator_of(self.model, target, self.stage)
            if there is simulator:
                continue
            if isinstance(there, simulate.MaskSimulator):
                self._replaced[target] = there
                simulate.detach(self.model, keep_values=False, targets=[target], stage=self.stage)
                if isinstance(simulator, simulate.MaskSimulator):
                    simulator.value = there.value
            simulate.register_simulator(self.model, target, simulator, self.stage)
        if self.finished:
            self.freeze()
        share_from_first([parameter.data for parameter in self.parameters()])
        if self._fingerprint is None:
            self._fingerprint = self._sums()

    def _withdraw(self) -> None:
        """Take the simulators off again, and put back what they replaced."""
        simulate.detach(self.model, keep_values=False, targets=list(self.simulators), stage=self.stage)
        for target, simulator in self._replaced.items():
            simulate.register_simulator(self.model, target, simulator, self.stage)
        self.simulators.clear()
        self._replaced.clear()

    def _mask(self, progress: float) -> None:
        """Mask the model; a progress of 0 masks nothing, whatever threshold or pattern the config has."""
        if progress > 0:
            super()._mask(progress)
            return
        modules = dict(self.model.named_modules())
        masks = {target: torch.ones([1] * len(own.shape)) for target, own in self.plan.goals.items()}
        simulate.attach_masks(self.model, self._attachable(masks, modules))
        self._attached = tuple(masks)
        self._progress = progress
        counts = {target: own.granularity.block_count(own.shape) for target, own in self.plan.goals.items()}
        self._report = self._describe(masks, {}, ["nothing is masked yet"], 0.0, counts)

    def _warn_of_misses(self) -> None:
        if self.steps >= self.training_steps:
            super()._warn_of_misses()

    def step(self) -> None:
        """The optimizer has made one step.

        Raises:
            DwindleError: The scores never moved, or are not finite.
        """
        if not self._compressed or self.finished:
            return
        self.steps += 1
        if self.steps == self.training_steps or self.steps == self._first_masks() + _PATIENCE:
            self._see_that_scores_move()
        if self.steps >= self.training_steps:
            self.finish()
        else:
            self.advance()

    def finish(self) -> None:
        """Make the masks final; :meth:`step` does so after ``training_steps``.

        Raises:
            ConfigError: ``compress()`` was not called.
            DwindleError: A metric is not a number; the masks stay as they were.
        """
        if not self._compressed:
            raise ConfigError("finish() ends what compress() began")
        if not self.finished:
            self._mask(1.0)
            self.finished = True
            self.freeze()

    def rest(self) -> None:
        """Make the masks final before ``training_steps`` are over."""
        self.finish()

    def loss(self) -> Tensor | float:
        """What to add to the loss: the penalty, and nothing once the masks stand."""
        return 0.0 if self.finished or not self._compressed else self.penalty()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The scores or gates, for ``run.add_parameters_to(optimizer)``."""
        for simulator in self.simulators.values():
            yield from simulator.parameters()

    def parameter_options(self) -> dict[str, Any]:
        """Options of the scores' group in an optimizer: no weight decay, and their own learning rate."""
        own = {} if self.learning_rate is None else {"lr": self.learning_rate}
        return {"weight_decay": 0.0, **own}

    def _first_masks(self) -> int:
        """Return the step from which on masks depend on scores."""
        return 0

    def _sums(self) -> list[float]:
        values = [parameter.detach().double() for parameter in self.parameters()]
        return [float(part) for value in values for part in (value.sum(), value.square().sum())]

    def _see_that_scores_move(self) -> None:
        if self._fingerprint and self._sums() == self._fingerprint:
            raise DwindleError(
                f"the scores of {type(self).__name__} are as they were at the beginning: no optimizer trains them; "
                "call run.add_parameters_to(optimizer) after entering dw.compress(...)"
            )

    def attach(self) -> None:
        """Begin, or go on after :meth:`detach`.

        Raises:
            ConfigError: The gates of an unfinished pruner were folded into the weights.
        """
        if self._final is not None and not self._attached:
            simulate.attach_masks(self.model, self._final)
            self._attached, self._final = tuple(entry[0] for entry in self._final), None
            return
        if self._compressed and not self._attached and not self.finished and self.simulators:
            if self.stage == "gate":
                raise ConfigError(
                    f"the gates of this {type(self).__name__} are folded into the weights; make a new pruner"
                )
            self._register()
        if self._compressed:
            super().attach()
        else:
            self.compress()

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Take masks and gates off, leaving their effect in the weights (or, with False, taking it back)."""
        failed = (
            sys.exc_info()[0] is not None
        )  # then the model is put back anyway, and that error is the news
        if keep_values and self._attached and not self.finished and not failed:
            warnings.warn(
                f"{type(self).__name__}: training ended after {self.steps} of {self.training_steps} steps; the masks "
                f"are not final (finish() makes them so)",
                stacklevel=3,
            )
        if self.finished and self._attached:
            self._final = self._masks_as_attached()
        for simulator in self.simulators.values():
            simulator.eval()  # what is drawn in training is not what stays
        if self.stage == "gate":
            targets = list(self.simulators)
            simulate.detach(self.model, keep_values=keep_values, targets=targets, stage="gate")
        return super().detach(keep_values=keep_values)

    def _masks_as_attached(self) -> list[tuple[Target, Tensor, str, int | None]]:
        return [
            (target, mask.value, mask.apply_method, mask.axis)
            for target, mask in simulate.simulated_targets(self.model, "mask").items()
            if target in self._attached and isinstance(mask, simulate.MaskSimulator)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on; scores and masks are in the model's own state."""
        return {**super().state_dict(), "steps": self.steps, "finished": self.finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "finished"} - set(state)
        if missing:
            raise ConfigError(f"the state of {type(self).__name__} needs {', '.join(sorted(missing))}")
        super().load_state_dict(state)
        self.steps, self.finished = int(state["steps"]), bool(state["finished"])
        if self.finished:
            self.freeze()


def whole_number(name: str, value: int, at_least: int = 0) -> int:
    """Return ``value`` when it is a whole number that is large enough.

    Raises:
        ConfigError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}: {value!r} is not a whole number from {at_least} on")
    return value
