"""``dw.auto``: name a budget, get the best model within it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, DwindleError, did_you_mean
from dwindle.graph.stand_ins import copied
from dwindle.measure.structure import example_call
from dwindle.quantization.simulation import is_quantized
from dwindle.search.auto.beginning import METHODS
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.efforts import effort_of
from dwindle.search.auto.judging import Judge
from dwindle.search.auto.limits import Limit, parse_limits
from dwindle.search.auto.making import Loss, Training
from dwindle.search.auto.result import AutoResult
from dwindle.search.auto.searching import Searching
from dwindle.search.auto.variant import Workpiece
from dwindle.training.inputs import forward_inputs
from dwindle.training.rate_search import RateSearch

__all__ = ["auto"]

#: Batches for importances and for ranges.
_BATCHES = 8


def auto(
    model: nn.Module,
    data: Any,
    *,
    budget: Mapping[str, float | str] | None = None,
    minimize: str | None = None,
    candidate: Candidate | Mapping[str, Any] | None = None,
    metric: str | Callable[[Callable[..., Any]], float] = "accuracy",
    validation: Iterable[Any] | None = None,
    greater_is_better: bool = True,
    max_drop: float = 0.01,
    effort: str = "minutes",
    trials: int | None = None,
    loss: Loss | None = nn.functional.cross_entropy,
    training: Training | None = None,
    methods: Sequence[str] = METHODS,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    axes: Sequence[str] | None = None,
    storage: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> AutoResult:
    """Find the best small model within a budget.

    Candidates (which residual blocks go, how much of each axis, which layers get a low rank, which stay in float) are
    made to fit the budget by measurement: a small model is built, exported and timed beside the original in the
    runtimes of the budget before anything is trained. A greedy answer comes first; then a search with Optuna goes on
    from it, each trial a short training with the original as teacher and int8 in the loop; the best are trained to the
    end, exported, and measured again. The model itself is only read.

    Args:
        model: A trained float model.
        data: Training batches, ``(inputs, target)``, that can be read again and again; inputs alone with ``loss=None``.
        budget: Limits by cost (:data:`dwindle.search.auto.limits.COSTS`): shares of the original's
            (``{"latency:onnxruntime": 0.25}``) or words (``{"latency:onnxruntime": "8 ms", "bytes": "500 kB"}``). All
            of them hold together.
        minimize: The other way round: a cost that becomes as small as ``max_drop`` allows. Shares of it are tried, each
            with a search of its own, and halved in between; limits of a budget hold besides.
        candidate: What a search found, such as ``found.candidate`` or that of a trial, done again without a search:
            made, trained and measured in the same way, with the same score. A budget is only compared with.
        metric: ``"accuracy"``, ``"agreement"`` with the original (no labels needed), or a function from something that
            is called like the model to a number.
        validation: Batches that the metric is taken on; a list, or anything that can be iterated once.
        greater_is_better: False for a metric that is a loss; the scores of the result are then its negatives.
        max_drop: What the metric may lose against the original. A result that loses more is returned, and says so.
        effort: ``"seconds"`` trains nothing (repair and ranges only, no labels needed), ``"minutes"``, ``"hours"``.
        trials: Candidates that are scored, in place of the effort's own number.
        loss: ``loss(outputs, target)``; None trains by the original's answers alone.
        training: How long and with what optimizer; the defaults suit small networks.
        methods: Some of :data:`METHODS`.
        example_inputs: The inputs whose latency counts; the first validation batch (or of the data) when not given.
        example_kwargs: Keyword inputs.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink; None: all that shrink by default.
        storage: A file that keeps the trials (SQLite, or what :func:`dwindle.search.studies.run_study` takes); a search
            that was killed goes on there.
        threads: Threads of one timed pass; None: each runtime's own choice.
        seed: Of everything that is random.
        progress: Show what is done; None means only when the error output is a terminal.

    Raises:
        ConfigError: An argument is not valid; nothing was done.
        DwindleError: No candidate within the budget was found; the message says how near the nearest came.
        MissingDependencyError: A runtime, or Optuna, is not installed.
    """
    if budget is None and minimize is None and candidate is None:
        raise ConfigError('give a budget, such as {"latency:onnxruntime": 0.25}, or what to minimize')
    limits = () if budget is None else parse_limits(budget)
    least = None if minimize is None else parse_limits({minimize: 1.0})[0].cost
    chosen = effort_of(effort, trials)
    for name in methods:
        if name not in METHODS:
            raise ConfigError(
                f"methods: {name!r} is not one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
            )
    if is_quantized(model):
        raise ConfigError("this model is quantized already; give the float model")
    if max_drop < 0:
        raise ConfigError(f"max_drop: {max_drop} is negative")
    own = copied(model).eval()
    kept = None if validation is None else list(validation)
    batches = list(itertools.islice(iter(data), _BATCHES))
    if not batches:
        raise ConfigError("data: it gave no batch")
    judge = Judge(metric, own, kept, greater_is_better)
    inputs, kwargs = _example(own, example_inputs, example_kwargs, kept or batches)
    kept_axes = (*ignore, *(() if "widths" in methods else ("*",)))
    workpiece = Workpiece(own, inputs, kwargs, batches, loss, ignore=kept_axes, axes=axes, seed=seed)
    costs = [limit.cost for limit in limits] + ([least] if least else [])
    search = Searching(
        workpiece, data, judge, chosen, training or Training(), loss, methods, seed, threads, progress
    )
    search.open(costs)
    if candidate is not None:
        given = candidate if isinstance(candidate, Candidate) else Candidate.from_json(candidate)
        return search.again(given, limits, max_drop)
    if least is None:
        return search.run(limits, max_drop, storage)
    return smallest(lambda share: search.run((*limits, Limit(least, share, False)), max_drop, storage))


def smallest(run: Callable[[float], AutoResult]) -> AutoResult:
    """Return the result of the smallest share whose score falls by no more than it may.

    Args:
        run: Searches within a share, 0 to 1, of the original's cost.

    Raises:
        DwindleError: No share was within reach.
    """
    rates = RateSearch(0.25, 0.05, first=0.5, largest=0.95)
    best: AutoResult | None = None
    nearest: AutoResult | None = None
    while (rate := rates.next()) is not None:
        try:
            found = run(round(1 - rate, 6))
        except DwindleError as error:
            if "out of reach" not in str(error):
                raise
            rates.tell(rate, False)
            continue
        rates.tell(rate, found.met)
        if found.met:
            best = found
        elif nearest is None or found.drop < nearest.drop:
            nearest = found
    if best is not None:
        return best
    if nearest is None:
        raise DwindleError("no share of the cost is within reach of any candidate")
    nearest.notes = [*nearest.notes, "no share that was tried loses as little as max_drop allows"]
    return nearest


def _example(
    model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None, batches: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None and not kwargs:
        return forward_inputs(model, batches[0])
    args, named = example_call(model, inputs, kwargs)
    return tuple(args), dict(named)
