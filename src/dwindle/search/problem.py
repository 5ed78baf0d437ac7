"""What a search works on: a model, how a trial of it is made and scored, and what it may cost.

The one trial interface of all searches: *counts of axes -> small (or masked) model -> score and cost*.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import nn

from dwindle.config.errors import RealizeError
from dwindle.config.schema import AxisKind
from dwindle.graph.analysis import Analysis, analyse
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.graph.modes import in_mode, modes_kept
from dwindle.graph.stand_ins import copied
from dwindle.pruning.axis_importance import AxisImportance, Loss
from dwindle.pruning.named_importances import Criterion, check_data, importance_of
from dwindle.pruning.shared_axes import shared_axes
from dwindle.realize.choose import best_indices, check_name, scores_by_axis
from dwindle.realize.plan import Plan
from dwindle.realize.shrink import Keep, ShrinkResult, liven, make_plan, shrink, zero_removed
from dwindle.realize.surgery import _held, tensor_slots
from dwindle.search.cost import Budget, Cost, CountedCost, MeasuredLatency, share_of_latency
from dwindle.search.journal import checksum
from dwindle.search.latency import LatencyModel
from dwindle.search.latency_prediction.predictor import LatencyPredictor
from dwindle.search.latency_problem import bound_to, prepared_prices
from dwindle.search.space import Space
from dwindle.search.storage import TrialStore
from dwindle.search.trial import Trial, key_of
from dwindle.training.checkpoint import random_state, restore_random_state
from dwindle.training.loop import seed_everything

__all__ = ["Problem"]

Evaluate = Callable[[nn.Module], float]
FineTune = Callable[[nn.Module], None]


class Problem:
    """A model to be made smaller within a budget. The model itself is never changed by a search.

    Args:
        model: Any module.
        example_inputs: A tensor, or a tuple of positional inputs.
        evaluate: Gives the score of a small model, higher is better; called in evaluation mode, without gradients.
        budget: ``{"macs": 0.5}``, ``{"params": 0.3}``, ``{"bytes": 0.3}``, ``{"latency": 0.5}`` (in torch) or
            ``{"latency:onnxruntime": 0.5}``: the share of the model's cost that may stay.
        fine_tune: Trains a small model for a short time before it is scored; called in training mode, and not for
            the whole model. None scores models as they are cut.
        importance: Which indices of an axis go first: a name, ``f(weight, dim) -> scores``, or an importance with
            options, as in :func:`dwindle.prune`.
        data: Batches for importances that run the model: at the beginning, and after each cut that is kept.
        loss: ``loss(outputs, target)`` for those that need labels.
        example_kwargs: Keyword inputs.
        axes: Kinds of axes that may shrink; None means all that shrink by default.
        ignore: Parameter names, module names or patterns whose axes stay.
        minimum: At least so many indices of each axis stay.
        largest_ratio: The most that any axis loses, below 1: no layer is emptied.
        round_to: Counts become a multiple of this.
        masked: Score the masked model of the original size instead of the small one (for models whose cut is slow).
        seed: Every trial begins with the random generators seeded by it and by its counts, so that a trial gives
            the same in any order and in any process.
        threads: Threads of a timed pass; None: the runtime's own choice. A small model is timed in turn with the
            whole one, and its cost is their ratio.
        repeats: Timed passes.

    Raises:
        ConfigError: An argument is not valid, or no axis may shrink.
        CaptureError: The model fails on the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        evaluate: Evaluate,
        budget: Mapping[str, float],
        *,
        fine_tune: FineTune | None = None,
        importance: str | Criterion | AxisImportance = "l1",
        data: Any = None,
        loss: Loss = nn.functional.cross_entropy,
        example_kwargs: Mapping[str, Any] | None = None,
        axes: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        minimum: int = 1,
        largest_ratio: float = 0.9,
        round_to: int = 1,
        masked: bool = False,
        seed: int = 0,
        threads: int | None = None,
        repeats: int = 30,
    ) -> None:
        self.budget = Budget.of(budget)
        for kind in axes or ():
            check_name(kind, list(get_args(AxisKind)), "axes")
        self.importance = importance_of(importance)
        check_data(self.importance, data)
        self.data, self.loss = data, loss
        self._importance_name = importance if isinstance(importance, str) else _name_of(importance)
        self.model = self.whole = model
        self.inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
        self.kwargs = dict(example_kwargs or {})
        self.evaluate, self.fine_tune = evaluate, fine_tune
        self.masked, self.seed, self.threads, self.repeats = masked, seed, threads, repeats
        self._bounds: dict[str, Any] = {
            "kinds": axes,
            "ignore": tuple(ignore),
            "minimum": minimum,
            "largest_ratio": largest_ratio,
            "round_to": round_to,
        }
        self.base = ""
        self._prices: LatencyModel | LatencyPredictor | None = None
        self._look(model)
        self.limit = math.nan
        if not self.is_measured:
            self.limit = self.budget.share * self.cost.predicted(self.space.full())

    def _look(self, model: nn.Module) -> None:
        """Analyse the model: its space, its costs, the importance of its indices."""
        self.analysis: Analysis = analyse(model, self.inputs, self.kwargs)
        self.space = Space.of(self.analysis, **self._bounds)
        self.scores: dict[Axis, torch.Tensor] = self.scores_by(self.importance)
        self.cost: Cost
        if not self.is_measured:
            self.cost = CountedCost(self.budget.cost, self.analysis)
        elif self._prices is not None:
            self._use(bound_to(self._prices, self.analysis, self.space))

    def scores_by(self, importance: AxisImportance) -> dict[Axis, torch.Tensor]:
        """Return the importance of each index of each variable: float64, ``[size]``."""
        tensors = {name: _held(*holders[0]) for name, holders in tensor_slots(self.model).items()}
        axes = shared_axes(self.model, self.analysis, [own.info for own in self.space.variables])
        if importance.needs_data:
            importance.measure(self.model, axes, self.data, self.loss)
        return scores_by_axis(axes, tensors, importance)

    @property
    def is_measured(self) -> bool:
        """Whether the cost is a latency that is measured."""
        return self.budget.cost.startswith("latency")

    @property
    def runtime(self) -> str:
        """The runtime whose latency is the cost."""
        return self.budget.cost.partition(":")[2] or "torch"

    def identity(self) -> dict[str, Any]:
        """What must agree for stored trials to be valid for this problem."""
        return {
            "model": checksum(self.model.state_dict()),
            "space": {variable.name: variable.size for variable in self.space.variables},
            "importance": self._importance_name,
            "cost": self.budget.cost,
            "fine-tuning": self.fine_tune is not None,
            "masked": self.masked,
            "seed": self.seed,
        }

    # costs

    def prepare(self, store: TrialStore) -> None:
        """Make what predicts a measured latency, once; measurements of an earlier run are taken from the store."""
        if self.is_measured and self._prices is None:
            self._use(prepared_prices(self, store))
            self.limit = self.budget.share

    def measured_share(self, counts: Counts) -> float:
        """Cut the model to counts, and return its latency as a share of the whole one's."""
        return self._share(self.build(counts).model)

    def _use(self, prices: LatencyModel | LatencyPredictor) -> None:
        self._prices = prices
        self.cost = MeasuredLatency(self.budget.cost, prices, self._share)

    def _share(self, model: nn.Module) -> float:
        """Latency of a model as a share of the whole one's."""
        return share_of_latency(
            model,
            self.whole,
            self.inputs,
            self.kwargs,
            self.runtime,
            threads=self.threads,
            repeats=self.repeats,
        )

    # trials

    def keep(self, counts: Counts) -> Keep:
        """Return which indices of each axis stay: the most important ones."""
        return {
            variable.axis: best_indices(self.scores[variable.axis], counts[variable.axis])
            for variable in self.space.variables
            if counts[variable.axis] < variable.size
        }

    def build(
        self,
        counts: Counts,
        *,
        model: nn.Module | None = None,
        verify: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> ShrinkResult:
        """Cut a copy of the model to counts.

        Args:
            counts: How many indices of each axis stay.
            model: What is cut, in place, instead of a copy.
            verify: Prove that the small model equals the masked one.
            optimizer: Goes on with the small model.

        Raises:
            RealizeError: The small model was not proven equal.
        """
        return shrink(
            copied(self.model) if model is None else model,
            self.analysis,
            self.space.solver,
            self.keep(counts),
            optimizer=optimizer,
            verify=verify,
            mask=_reference,
        )

    def trained(self, counts: Counts, *, verify: bool = False) -> ShrinkResult:
        """Cut a copy of the model to counts, and fine-tune it where that is asked for, the same way every time.

        Args:
            counts: How many indices of each axis stay.
            verify: Prove the cut, before the fine-tuning.

        Raises:
            RealizeError: The small model was not proven equal.
        """
        result = self.build(counts, verify=verify)
        self._tune(result.model, counts)
        return result

    def _masked(self, counts: Counts) -> nn.Module:
        """Return a masked copy of the model, fine-tuned where that is asked for."""
        model = copied(self.model)
        zero_removed(model, make_plan(self.analysis, self.space.solver, self.keep(counts)))
        self._tune(model, counts)
        return model

    def _tune(self, model: nn.Module, counts: Counts) -> None:
        if self.fine_tune is not None and counts != self.space.full():
            with self.seeded(key_of(self.space.named(counts), self.base)), modes_kept(model):
                model.train()
                self.fine_tune(model)

    def assess(self, counts: Counts) -> Trial:
        """Carry out one trial.

        Args:
            counts: How many indices of each axis stay.

        Returns:
            The trial; with a score of ``-inf`` and the reason where the model could not be cut or has no score.
        """
        started = time.perf_counter()
        named = self.space.named(counts)
        key, error, score, cost = key_of(named, self.base), None, -math.inf, self.cost.predicted(counts)
        try:
            small = self._masked(counts) if self.masked else self.trained(counts).model
        except RealizeError as failure:
            error = str(failure)
        else:
            with self.seeded(key), torch.no_grad(), in_mode(small, training=False):
                score = float(self.evaluate(small))
            if not self.masked:
                cost = self.cost.measured(counts, small)
        if error is None and not math.isfinite(score):
            error, score = f"the score is {score}", -math.inf
        return Trial(
            key,
            named,
            self.space.ratios(counts),
            score,
            cost,
            time.perf_counter() - started,
            self.base,
            error,
        )

    @contextmanager
    def seeded(self, key: str) -> Iterator[None]:
        """Seed every random generator by the key of a trial, and put them back as they were."""
        before = random_state()
        seed_everything((int(key, 16) + self.seed) % 2**31)
        try:
            yield
        finally:
            restore_random_state(before)

    # rounds

    def of_round(self, model: nn.Module, base: str) -> Problem:
        """Return the same problem for the model of a finished round.

        Args:
            model: The smaller model.
            base: Names the result that it is.
        """
        twin = self.limited(self.limit)
        twin.model, twin.base = model, base
        floors = self._bounds.get("floors") or {own.name: own.least for own in self.space.variables}
        twin._bounds = {**self._bounds, "floors": floors}
        twin._look(model)
        return twin

    def limited(self, limit: float) -> Problem:
        """Return the same problem with another limit, in the unit of the cost."""
        twin = copy.copy(self)
        twin.limit = limit
        return twin

    def meets(self, trial: Trial, tolerance: float = 0.0) -> bool:
        """Whether a trial succeeded within the budget."""
        return trial.error is None and trial.cost <= self.limit * (1 + tolerance)


def _reference(model: nn.Module, plan: Plan) -> None:
    """Make the reference of the proof: lively numbers, and zeros wherever something is cut."""
    liven(model)
    zero_removed(model, plan)


def _name_of(importance: Criterion | AxisImportance) -> str:
    """Return what tells one importance from another: the function's name, or the class with its options."""
    if not isinstance(importance, AxisImportance):
        return getattr(importance, "__name__", type(importance).__name__)
    options = {
        name: value for name, value in vars(importance).items() if isinstance(value, str | int | float)
    }
    return f"{type(importance).__name__}({', '.join(f'{name}={value}' for name, value in sorted(options.items()))})"
