"""A model from which some blocks were taken, or in which layers are of low rank, and what may shrink in it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis, analyse
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.graph.stand_ins import copied
from dwindle.pruning.named_importances import importance_of
from dwindle.realize.factorize import factorize
from dwindle.realize.prune import prune
from dwindle.search.problem import Problem
from dwindle.search.space import Space
from dwindle.training.inputs import forward_inputs

__all__ = ["Variant", "Workpiece"]


class Workpiece:
    """The original with everything that its variants need.

    Args:
        model: The trained float model; only read.
        inputs: Positional example inputs.
        kwargs: Keyword inputs.
        batches: Inputs for importances and for ranges, without labels, or with them where ``labelled``.
        loss: Loss for importances that need labels.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink; None is all that shrink by default.
        round_to: Counts become a multiple of it.
        largest_ratio: The most that any axis loses.
        seed: For random generators.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        batches: Sequence[Any],
        loss: Any,
        *,
        ignore: Sequence[str] = (),
        axes: Sequence[str] | None = None,
        round_to: int = 1,
        largest_ratio: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.model, self.inputs, self.kwargs = model, tuple(inputs), dict(kwargs)
        self.batches, self.loss, self.seed = list(batches), loss, seed
        self.options: dict[str, Any] = {
            "ignore": tuple(ignore),
            "axes": axes,
            "round_to": round_to,
            "largest_ratio": largest_ratio,
        }
        self._variants: dict[tuple[Any, ...], Variant] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def answers(self) -> Path:
        """A folder for the original's answers to training batches; gone with the workpiece."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dwindle-answers-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def unlabelled(self) -> list[Any]:
        """Return the inputs of the batches, labels left out: positional ones as a tuple, or keyword ones as a dict."""
        inputs = (forward_inputs(self.model, batch) for batch in self.batches)
        return [kwargs or args for args, kwargs in inputs]

    def variant(self, blocks: Sequence[str] = (), ranks: Mapping[str, int] | None = None) -> Variant:
        """Return the model without some blocks and with chains of some ranks, made once.

        Raises:
            ConfigError: A block or a layer is not known.
            RealizeError: The smaller model is not proven equal.
        """
        key = (tuple(sorted(blocks)), tuple(sorted((ranks or {}).items())))
        if key not in self._variants:
            self._variants[key] = Variant(self, self._made(blocks, ranks or {}))
        return self._variants[key]

    def _made(self, blocks: Sequence[str], ranks: Mapping[str, int]) -> nn.Module:
        model = copied(self.model)
        if blocks:
            model = prune(model, self.inputs, example_kwargs=self.kwargs or None, blocks=blocks).model
        if ranks:
            model = with_ranks(self, model, ranks)
        return model.eval()


def with_ranks(workpiece: Workpiece, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Return the model with chains of these ranks in place of layers, fitted to the batches.

    Args:
        workpiece: Has the example inputs and the batches.
        model: Changed in place.
        ranks: By path.
    """
    entries = [{"op_names": [path], "rank": rank} for path, rank in ranks.items()]
    return factorize(
        model,
        entries,
        example_inputs=workpiece.inputs,
        example_kwargs=workpiece.kwargs or None,
        data=workpiece.batches,
    ).model


class Variant:
    """A model whose axes may shrink.

    Args:
        workpiece: Where it comes from.
        model: The model; only read.

    Attributes:
        space: Its axes.
    """

    def __init__(self, workpiece: Workpiece, model: nn.Module) -> None:
        self.workpiece, self.model = workpiece, model
        try:
            self._problem: Problem | None = Problem(
                model,
                workpiece.inputs,
                lambda own: 0.0,
                {"macs": 1.0},
                example_kwargs=workpiece.kwargs or None,
                **workpiece.options,
            )
        except ConfigError as error:
            if "no axis of this model may shrink" not in str(error):
                raise
            self._problem = None
        self._analysis: Analysis | None = None
        self._scores: dict[str, dict[Axis, Tensor]] = {}

    @property
    def problem(self) -> Problem:
        """Its axes, what makes small models of counts.

        Raises:
            ConfigError: No axis may shrink.
        """
        if self._problem is None:
            raise ConfigError("no axis of this model may shrink (dwindle inspect says why for each)")
        return self._problem

    @property
    def analysis(self) -> Analysis:
        """Its axes and its blocks."""
        if self._problem is not None:
            return self._problem.analysis
        if self._analysis is None:
            self._analysis = analyse(self.model, self.workpiece.inputs, self.workpiece.kwargs)
        return self._analysis

    @property
    def can_shrink(self) -> bool:
        """Whether any axis may."""
        return self._problem is not None

    @property
    def space(self) -> Space:
        """Its axes."""
        return self.problem.space

    def scores(self, importance: str) -> dict[Axis, Tensor]:
        """Return the importance of every index, in one unit for all axes where it runs the model; kept."""
        if importance not in self._scores:
            own = importance_of(importance, comparable=True)
            problem = self.problem
            problem.data, problem.loss = self.workpiece.batches, self.workpiece.loss
            self._scores[importance] = problem.scores_by(own)
        return self._scores[importance]

    def cut(self, counts: Counts, importance: str, *, verify: bool = False) -> nn.Module:
        """Return a small copy with these counts.

        Args:
            counts: How many indices of each axis stay.
            importance: Which ones.
            verify: Prove that it equals the masked model.

        Raises:
            RealizeError: It is not proven equal.
        """
        self.problem.scores = self.scores(importance)
        return self.problem.build(counts, verify=verify).model.eval()
