"""Ranks that are learned while the model is trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import FactorizationSetting, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.factorization.directions import (
    GatedDirections,
    gated_modes,
    head_start,
    principal_directions,
)
from dwindle.factorization.forms import form_of, kernel_of, method_for
from dwindle.factorization.observation import observed_calls
from dwindle.factorization.planning import check_target, layer_weight, selected_settings, unfit_layers
from dwindle.factorization.rank_goals import RankGoals
from dwindle.factorization.ranks import LayerProblem, said_ranks
from dwindle.factorization.svd import widened
from dwindle.graph.macs import count_macs
from dwindle.simulate.hard_concrete import first_log_alpha, logistic_noise, open_probability
from dwindle.training.claims import Claim
from dwindle.training.processes import share_from_first
from dwindle.training.schedule import CubicSchedule, Schedule

__all__ = ["LowRankTraining"]

#: Share of the steps over which the goal is approached by default; the learning rate's bounds (Adam's logits).
_RISING, _TRAVEL, _LARGEST_RATE = 0.6, 30.0, 0.2


class LowRankTraining:
    """A compressor that learns the rank of each layer in a training run.

    Each weight is seen through its principal directions, each with a gate that is drawn from a hard concrete
    distribution (Louizos et al., https://arxiv.org/abs/1712.01312) at every step; ``run.loss()`` steers the expected
    cost of the chains, in which the ranks are the expected numbers of open gates, towards the goal. So layers compete
    for the budget by what they give the task, and small directions close first where the task does not mind. After
    ``training_steps`` the least likely directions go, as many as the goal asks for. Leaving the run folds the gates
    into the weights, which then have the learned ranks exactly; fine-tune the chains, whose factors are both free::

        with dw.compress(model, [pruner, low_rank]) as run: ...
        result = dw.factorize(model, low_rank.config_list(), example_inputs=(x,))

    What it does to a weight comes before masks; ``run.realize()`` makes the smaller layers at once. A quantizer of the
    same weight is refused, since that weight will vanish: quantize the chains.

    Args:
        model: The model.
        config_list: Entries of the kind ``factorization``; None is every layer that can be factorized. Layers with a
            ``rank``, ``rank_ratio`` or ``energy`` of their own have that as goal, the others share the target. Methods
            are those of ``auto``.
        example_inputs: A tensor or a tuple of positional inputs.
        example_kwargs: Keyword inputs.
        training_steps: Optimizer steps until the ranks stand.
        target: ``{"macs": 0.5}`` or ``{"params": 0.5}``: the share of the whole model that stays.
        schedule: Share of the way to the goal by optimizer step, 0 to 1; None rises as ``1 - (1 - t)**3`` over the
            first 60 % of ``training_steps``.
        width: Distance of the cost from its goal, as a share of what the layers cost whole, at which the penalty is 1.
        first_closed: Probability that the gate of a small direction is zero at the beginning; large ones are surer.
        learning_rate: Of the gates; None is 30 over ``training_steps``, at most 0.2, which suits Adam.
        seed: Of the gates that are drawn; the same in all processes of a run.

    Attributes:
        left: Layers that were asked for and stay as they are, with the reason.
        finished: Whether the ranks stand.

    Raises:
        ConfigError: An argument is not valid.
        CaptureError: The model fails on the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]] | None = None,
        *,
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        training_steps: int,
        target: Mapping[str, float] | None = None,
        schedule: Schedule | None = None,
        width: float = 0.05,
        first_closed: float = 0.02,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(training_steps, bool) or not isinstance(training_steps, int) or training_steps < 1:
            raise ConfigError(f"training_steps: {training_steps!r} is not a whole number from 1 on")
        if not width > 0:
            raise ConfigError(f"width: {width!r} is not a positive number")
        if not 0 < first_closed < 1:
            raise ConfigError(f"first_closed: {first_closed!r} is not a probability between 0 and 1")
        self.unit, share = check_target(target)
        self.model, self.training_steps, self.width, self.seed = model, training_steps, width, seed
        self.first_closed = first_closed
        self.learning_rate = (
            min(_LARGEST_RATE, _TRAVEL / training_steps) if learning_rate is None else learning_rate
        )
        self.schedule = schedule or CubicSchedule(0.0, 1.0, steps=max(1, int(training_steps * _RISING)))
        self.steps, self.finished = 0, False
        self.simulators: dict[str, GatedDirections] = {}
        self._first: dict[str, list[float]] = {}
        self._fingerprint: list[float] = []
        self._attached = False
        inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
        call = (inputs, dict(example_kwargs or {}))
        self._plan(selected_settings(model, config_list, FactorizationSetting()), call, share)

    def _plan(
        self, settings: Mapping[str, FactorizationSetting], call: tuple[Any, Any], share: float | None
    ) -> None:
        """Work out which layers take part and what their goals are."""
        model = simulate.gathered(self.model)
        self.left = unfit_layers(model, list(settings))
        weights = {n: layer_weight(model.get_submodule(n)) for n in settings if n not in self.left}
        forms = {name: form_of(model.get_submodule(name), own) for name, own in weights.items()}
        calls = observed_calls(model, forms, call)
        problems: dict[str, LayerProblem] = {}
        goals: dict[str, tuple[int, ...]] = {}
        for name, form in forms.items():
            if name not in calls:
                self.left[name] = "no call of it was seen"
                continue
            kernel = widened(kernel_of(form, weights[name]))
            problem = LayerProblem(form, kernel, method_for(form), calls[name])
            said = said_ranks(problem, settings[name])
            if said is not None:
                goals[name] = said
            elif share is None:
                raise ConfigError(f"{name}: no rank; give rank, rank_ratio, energy or a target")
            problems[name] = LayerProblem(
                form, kernel[:0], problem.method, calls[name]
            )  # the weight moves on
        if not problems:
            raise ConfigError(f"no layer can be factorized: {self.left}")
        self.goals = RankGoals(problems, goals, self.unit)
        if share is not None and self.goals.shared:
            self.goals.share_of(self._total(call), share)

    def _total(self, call: tuple[Any, Any]) -> float:
        """Return what the whole model costs."""
        if self.unit == "macs":
            return float(count_macs(simulate.gathered(self.model), *call))
        return float(sum(parameter.numel() for parameter in self.model.parameters()))

    def sharding_problem(self) -> str | None:
        """Return why it cannot work on a model that ``fully_shard`` has cut up: it can."""
        return None

    # The way through.

    def attach(self) -> None:
        """Put gates on the weights, all of them nearly open.

        Raises:
            ConfigError: It was attached before, or a weight has such gates already.
        """
        if self._attached:
            return
        if self.simulators:
            if self.finished:
                return  # the ranks are in the weights
            raise ConfigError("the gates of this LowRankTraining are folded into the weights; make a new one")
        made: dict[str, GatedDirections] = {}
        try:
            for name, problem in self.goals.problems.items():
                made[name] = self._simulator(name, problem)
                simulate.register_simulator(self.model, Target(name, "weight"), made[name], "low_rank")
        except BaseException:
            simulate.detach(self.model, keep_values=False, targets=_targets(made), stage="low_rank")
            raise
        self.simulators, self._attached = made, True
        share_from_first([own.data for own in self.parameters()])
        self._first = {name: [float(rank.detach()) for rank in self._expected(name)] for name in made}
        self._fingerprint = self._sums()
        self._draw()

    def _simulator(self, name: str, problem: LayerProblem) -> GatedDirections:
        weight = simulate.whole(layer_weight(self.model.get_submodule(name)))
        kernel, modes = widened(kernel_of(problem.form, weight)), gated_modes(problem.form)
        found = [principal_directions(kernel, mode) for mode in modes]
        return GatedDirections(
            [basis.to(weight) for basis, _ in found],
            modes,
            [head_start(energies) + first_log_alpha(self.first_closed) for _, energies in found],
            transposed=problem.form.transposed,
        )

    def _draw(self) -> None:
        for name, simulator in self.simulators.items():
            simulator.draw(
                [
                    logistic_noise(gate.shape, self.seed, self.steps, f"{name}/{mode}", gate.device)
                    for mode, gate in enumerate(simulator.gates)
                ]
            )

    def step(self) -> None:
        """The optimizer has made one step.

        Raises:
            DwindleError: The gates never moved, or one is not a number.
        """
        if not self._attached or self.finished:
            return
        self.steps += 1
        if self.steps >= self.training_steps:
            self._see_that_gates_moved()
            self.finish()
        else:
            self._draw()

    def loss(self) -> Tensor | float:
        """Return the squared distance of the expected cost from where it should be by now; 0 once the ranks stand."""
        if not self._attached or self.finished:
            return 0.0
        expected = {name: self._expected(name) for name in self.simulators}
        return self.goals.penalty(self._first, expected, float(self.schedule(self.steps)), self.width)

    def _sums(self) -> list[float]:
        return [float(gate.detach().double().sum()) for gate in self.parameters()]

    def _see_that_gates_moved(self) -> None:
        if self._sums() == self._fingerprint:
            raise DwindleError(
                "the gates of LowRankTraining are as they were at the beginning: no optimizer trains them; call "
                "run.add_parameters_to(optimizer) after entering dw.compress(...)"
            )

    def _expected(self, name: str) -> list[Any]:
        return [open_probability(gate).sum() for gate in self.simulators[name].gates]

    def finish(self) -> None:
        """Make the ranks final; :meth:`step` does so after ``training_steps``.

        Raises:
            ConfigError: It is not attached.
            DwindleError: A gate is not a number; everything stays as it was.
        """
        if self.finished:
            return
        if not self._attached:
            raise ConfigError("finish() ends what attach() began")
        for name, simulator in self.simulators.items():
            if not all(bool(torch.isfinite(gate).all()) for gate in simulator.gates):
                raise DwindleError(f"{name}: a gate is not a number")
        ranks = self.goals.final_ranks({name: list(own.gates) for name, own in self.simulators.items()})
        for name, simulator in self.simulators.items():
            stay = []
            for gate, rank in zip(simulator.gates, ranks[name], strict=True):
                chosen = torch.zeros_like(gate, dtype=torch.bool)
                chosen[gate.detach().argsort(descending=True, stable=True)[:rank]] = True
                stay.append(chosen)
            simulator.close(stay)
        self.finished = True

    def rest(self) -> None:
        """Make the ranks final before ``training_steps`` are over."""
        self.finish()

    def claims(self) -> Iterator[Claim]:
        """Yield the weights that will become products of smaller ones."""
        for name in self.goals.problems:
            yield Claim(Target(name, "weight"), "low_rank")

    def status(self) -> dict[str, float]:
        """Return ``rank``, the mean share of directions that is expected to stay."""
        shares = [
            float(rank.detach()) / gate.numel()
            for name, own in self.simulators.items()
            for rank, gate in zip(self._expected(name), own.gates, strict=True)
        ]
        return {"rank": sum(shares) / len(shares)} if shares else {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The gates, for ``run.add_parameters_to(optimizer)``."""
        for simulator in self.simulators.values():
            yield from simulator.gates

    def parameter_options(self) -> dict[str, Any]:
        """Options of the gates' group in an optimizer: no weight decay, their own learning rate, and Adam."""
        return {"weight_decay": 0.0, "lr": self.learning_rate, "adaptive": True}

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the ranks of each layer: one, or for Tucker-2 those of outputs and of inputs.

        Raises:
            DwindleError: They do not stand yet.
        """
        if not self.finished:
            raise DwindleError(f"the ranks stand after {self.training_steps} steps, not after {self.steps}")
        return {name: simulator.ranks() for name, simulator in self.simulators.items()}

    def config_list(self) -> list[dict[str, Any]]:
        """Return the learned ranks as entries for :func:`dwindle.factorize`.

        Raises:
            DwindleError: They do not stand yet.
        """
        return [
            {"op_names": [name], "rank": list(own) if len(own) > 1 else own[0]}
            for name, own in self.ranks().items()
        ]

    def realize_options(self) -> dict[str, list[dict[str, Any]]]:
        """Ask ``run.realize()`` for chains of the learned ranks.

        Raises:
            DwindleError: They do not stand yet.
        """
        return {"factorize": self.config_list()}

    def detach(self, *, keep_values: bool = True) -> nn.Module:
        """Take the gates off, leaving their effect in the weights (or, with False, taking it back)."""
        if not self._attached:
            return self.model
        failed = (
            sys.exc_info()[0] is not None
        )  # then the model is put back anyway, and that error is the news
        if keep_values and not self.finished and not failed:
            warnings.warn(
                f"LowRankTraining: training ended after {self.steps} of {self.training_steps} steps; the ranks are not "
                f"final (finish() makes them so)",
                stacklevel=3,
            )
        for simulator in self.simulators.values():
            simulator.eval()  # what is drawn in training is not what stays
        simulate.detach(
            self.model, keep_values=keep_values, targets=_targets(self.simulators), stage="low_rank"
        )
        self._attached = False
        if not self.finished and (failed or not keep_values):
            self.simulators, self.steps = {}, 0
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on; the gates are in the model's own state."""
        return {"steps": self.steps, "finished": self.finished, "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        missing = {"steps", "finished", "first"} - set(state)
        if missing:
            raise ConfigError(f"the state of LowRankTraining needs {', '.join(sorted(missing))}")
        self.steps, self.finished = int(state["steps"]), bool(state["finished"])
        self._first = {name: [float(rank) for rank in own] for name, own in state["first"].items()}
        for simulator in self.simulators.values():
            simulator.sampling = not self.finished
        self._draw()


def _targets(simulators: Mapping[str, nn.Module]) -> list[Target]:
    return [Target(name, "weight") for name in simulators]
