"""Any pruner under a schedule: its ratios grow while the model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.pruning.base import Pruner
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.report import PruningReport
from dwindle.pruning.trained import TrainingPruner
from dwindle.training.claims import Claim, claims_of
from dwindle.training.schedule import CubicSchedule, LinearSchedule, Schedule


class ScheduledPruner:
    """A compressor that measures and masks again with growing ratios, during one training run.

    Masked weights keep their values, so a weight that was masked early may come back. When the goal is reached the
    masks stay as they are.

    Args:
        pruner: Any pruner; what it sees of the training between two updates is what its next masks are made from.
        schedule: Values over optimizer steps (0 is before the first). A schedule that is not reached by steps
            alone (:class:`dwindle.training.AdaptiveSchedule`) is asked in the same way.
        interval: The schedule is asked after every so many steps.
        values: What the schedule gives: ``"progress"``, a share of each goal (0 to 1), or ``"ratio"``, the ratio of
            the targets with the largest goal, along with which the others are scaled.

    Raises:
        ConfigError: An argument is not valid, or the pruner decides by itself when its masks come.
    """

    def __init__(
        self,
        pruner: Pruner,
        schedule: Schedule | Callable[[int], float],
        interval: int = 1,
        *,
        values: Literal["progress", "ratio"] = "progress",
    ) -> None:
        if not isinstance(pruner, Pruner):
            raise ConfigError(f"pruner must be a pruner, got a {type(pruner).__name__}")
        if not callable(schedule):
            raise ConfigError(f"schedule must be a schedule or a function of the step, got {schedule!r}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ConfigError(f"interval must be a positive number of steps, got {interval!r}")
        if values not in ("progress", "ratio"):
            raise ConfigError(f"values must be 'progress' or 'ratio', got {values!r}")
        if getattr(pruner, "training_steps", None) is not None and not _waits(pruner):
            raise ConfigError("training_steps and a schedule both say when the masks come; give one of them")
        self.pruner, self.schedule, self.interval = pruner, schedule, interval
        self.steps = 0
        self.progress: float | None = None
        self._goal = _largest_goal(pruner) if values == "ratio" else 1.0

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self.pruner.model

    @property
    def masks(self) -> dict[str, dict[str, Tensor]]:
        """The masks of the model, ``{module: {target: mask}}``."""
        return self.pruner.masks

    @property
    def finished(self) -> bool:
        """Whether the goal is reached."""
        return self.progress == 1.0

    def report(self) -> PruningReport:
        """Return what was asked at the last update and what was done."""
        return self.pruner.report()

    def attach(self) -> None:
        """Put the first masks on the model, or put the last ones back."""
        if self.progress is None:
            self.progress = self._now()
            self.pruner.compress(self.progress)
        else:
            self.pruner.attach()

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Attach; return the model and its masks as they are before the first step."""
        self.attach()
        return self.model, self.masks

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Take the masks off, leaving masked weights at zero (or, with False, as they were)."""
        return self.pruner.detach(keep_values=keep_values)

    def step(self) -> None:
        """The optimizer has made one step; where the schedule says so, the masks are renewed."""
        self.pruner.step()
        self.steps += 1
        if isinstance(self.pruner, TrainingPruner) and self.pruner.finished:
            self.progress = 1.0
        if self.finished or self.steps % self.interval:
            return
        progress = self._now()
        if progress != self.progress:
            self.pruner.update(progress)
            self.progress = progress
            if self.finished:
                self._stop()

    def _now(self) -> float:
        value = float(self.schedule(self.steps)) / self._goal
        if not -1e-9 <= value <= 1.0 + 1e-9:
            raise ConfigError(
                f"step {self.steps}: the schedule gives {value * self._goal:g}, which is not between 0 and "
                f"{self._goal:g}"
            )
        # a value that is the goal up to its last bit is the goal
        return 1.0 if value > 1.0 - 1e-9 else max(value, 0.0)

    def _stop(self) -> None:
        if isinstance(self.pruner, ObservingPruner):
            self.pruner.stop_watching()
        elif isinstance(self.pruner, TrainingPruner) and self.pruner._compressed:
            self.pruner.finish()

    def rest(self) -> None:
        """Leave the masks as they are, and watch nothing more."""
        self._stop()

    def claims(self) -> Iterator[Claim]:
        """Yield what the pruner will mask."""
        yield from claims_of(self.pruner)

    def sharding_problem(self) -> str | None:
        """Return why the pruner cannot work on a model that ``fully_shard`` has cut up; None where it can."""
        return self.pruner.sharding_problem()

    @property
    def name(self) -> str:
        """The pruner's own name."""
        return type(self.pruner).__name__

    def status(self) -> dict[str, float]:
        """What the pruner says of itself."""
        return self.pruner.status()

    def loss(self) -> Tensor | float:
        """What the pruner adds to the loss."""
        return self.pruner.loss()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pruner's own trainable parameters."""
        return self.pruner.parameters()

    def parameter_options(self) -> dict[str, Any]:
        """The options that the pruner's own parameters want in an optimizer."""
        options: dict[str, Any] = getattr(self.pruner, "parameter_options", dict)()
        return options

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on: the step, the pruner's state, and the schedule's where it has one."""
        save = getattr(self.schedule, "state_dict", None)
        return {
            "steps": self.steps,
            "progress": self.progress,
            "schedule": save() if callable(save) else None,
            "pruner": self.pruner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "progress", "schedule", "pruner"} - set(state)
        if missing:
            raise ConfigError(f"the state of a scheduled pruner needs {', '.join(sorted(missing))}")
        self.pruner.load_state_dict(state["pruner"])
        load = getattr(self.schedule, "load_state_dict", None)
        if callable(load) and state["schedule"] is not None:
            load(state["schedule"])
        self.steps = int(state["steps"])
        self.progress = None if state["progress"] is None else float(state["progress"])
        if self.finished:
            self._stop()


class LinearPruner(ScheduledPruner):
    """A pruner whose ratios grow in a straight line: after update ``k`` they are ``k / total_times`` of the goal.

    Args:
        pruner: Any pruner.
        interval_steps: Optimizer steps between two updates.
        total_times: Updates until the goal is reached.

    Raises:
        ConfigError: An argument is not valid.
    """

    def __init__(self, pruner: Pruner, interval_steps: int, total_times: int) -> None:
        super().__init__(
            pruner, LinearSchedule(0.0, 1.0, _steps(interval_steps, total_times)), interval_steps
        )


class AGPPruner(ScheduledPruner):
    """Automated gradual pruning: after update ``k`` ratios are ``1 - (1 - k / total_times)**3`` of the goal.

    Zhu and Gupta, "To prune, or not to prune" (https://arxiv.org/abs/1710.01878).

    Args:
        pruner: Any pruner.
        interval_steps: Optimizer steps between two updates.
        total_times: Updates until the goal is reached.

    Raises:
        ConfigError: An argument is not valid.
    """

    def __init__(self, pruner: Pruner, interval_steps: int, total_times: int) -> None:
        super().__init__(pruner, CubicSchedule(0.0, 1.0, _steps(interval_steps, total_times)), interval_steps)


def _steps(interval_steps: int, total_times: int) -> int:
    for name, number in {"interval_steps": interval_steps, "total_times": total_times}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} must be a positive number, got {number!r}")
    return interval_steps * total_times


def _waits(pruner: Pruner) -> bool:
    """Return whether a pruner that trains leaves its masks alone until it is finished (gates do, scores do not)."""
    return isinstance(pruner, TrainingPruner) and type(pruner).advance is TrainingPruner.advance


def _largest_goal(pruner: Pruner) -> float:
    goals = [own.setting.goal for own in pruner.plan.goals.values() if own.setting.goal is not None]
    if not goals or max(goals) == 0:
        raise ConfigError("values='ratio' needs a sparse_ratio above 0 in the config_list")
    return max(goals)
