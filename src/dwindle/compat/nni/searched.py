"""Searches of NNI on those of dwindle: AMC of 2.x, NetAdapt and Sensitivity of 1.x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.compat.nni.v2.compressor import ConfigList
from dwindle.compat.nni.v2.evaluator import judges, read_arguments
from dwindle.compat.nni.v2.iterative import IterativePruner
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph import analyse
from dwindle.graph.modes import modes_kept
from dwindle.pruning import L1NormPruner
from dwindle.pruning.coupling import Coupling
from dwindle.search import AMC, AgentOptions, NetAdapt, Problem, SearchResult, Sensitivity, run_search

#: The importances of NNI's structured algorithms.
_IMPORTANCES = {"l1": "l1", "l2": "l2", "fpgm": "fpgm"}


class _SearchPruner(IterativePruner):
    """Base: a problem made of a config, searched."""

    def problem(
        self,
        budget: str,
        algorithm: str,
        inputs: tuple[Any, ...],
        evaluate: Callable[[nn.Module], float],
        fine_tune: Callable[[nn.Module], Any] | None,
    ) -> Problem:
        """Return the problem: the config's sparsity is the share of the budget that goes.

        Raises:
            ConfigError: The algorithm cannot shrink layers, or the config asks for several ratios.
        """
        if algorithm not in _IMPORTANCES:
            raise ConfigError(
                f"{type(self).__name__} cuts channels; its algorithm is one of {', '.join(_IMPORTANCES)}, not "
                f"{algorithm!r}{did_you_mean(algorithm, _IMPORTANCES)}"
            )
        plan = L1NormPruner(self.bound_model, self.config_list).plan
        ratios = {planned.setting.goal for planned in plan.goals.values()}
        bounds = {own.setting.max_sparse_ratio or 0.99 for own in plan.goals.values()}
        if len(ratios) != 1 or None in ratios:
            raise ConfigError(
                f"a search needs one sparsity for all layers, the config has {sorted(map(str, ratios))}"
            )
        modules = {target.module for target in plan.goals}
        return Problem(
            self.bound_model,
            inputs,
            evaluate,
            {budget: 1.0 - float(next(iter(ratios)) or 0.0)},
            fine_tune=fine_tune,
            importance=_IMPORTANCES[algorithm],
            ignore=_other_axes(self.bound_model, inputs, modules),
            largest_ratio=min(max(bounds), 0.99),
        )

    def ended(self, result: SearchResult) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Remember the result; its model is small, so that no masks are left."""
        self.result = result
        self._best = ("best", result.model, {}, result.best.score, self.config_list)
        return result.model, {}


def _other_axes(model: nn.Module, inputs: tuple[Any, ...], modules: set[str]) -> list[str]:
    """Return one parameter for each axis that a module outside of the config makes, and on few other axes."""
    coupling = Coupling(model, analyse(model, inputs, {}))
    named = []
    for info in coupling.analysis.selected():
        makers = [
            path
            for path, dim in info.parameter_dims
            if (parameter := coupling._parameter(path)[0]) is not None
            and parameter.dim() > 1
            and not coupling.is_reader(path, dim)
            and not (getattr(coupling._parameter(path)[1], "groups", 1) > 1 and parameter.shape[1] == 1)
        ]
        if makers and any(path.rpartition(".")[0] not in modules for path in makers):
            places = sorted(
                info.parameter_dims,
                key=lambda place: (len(coupling.analysis.parameter_axes[place[0]]), place[0]),
            )
            named.append(places[0][0])
    return named


class AMCPruner(_SearchPruner):
    """Learns the ratio of each layer with a DDPG agent (https://arxiv.org/abs/1802.03494).

    Arguments: ``total_episode, model, config_list, evaluator, pruning_algorithm='l1', log_dir='.',
    keep_intermediate_result=False, ddpg_params={}, pruning_params={}, target='flops'``; 2.0 to 2.8: ``dummy_input,
    evaluator`` (a function), and ``finetuner=None`` before ``ddpg_params``. The result is the small model.
    """

    def __init__(
        self, total_episode: int, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any
    ) -> None:
        middle = ["pruning_algorithm", "log_dir", "keep_intermediate_result"]
        tail = ["ddpg_params", "pruning_params", "target"]
        given = read_arguments(
            ["evaluator", *middle, *tail],
            ["dummy_input", "evaluator", *middle, "finetuner", *tail],
            {
                "pruning_algorithm": "l1",
                "log_dir": ".",
                "keep_intermediate_result": False,
                "finetuner": None,
                "ddpg_params": {},
                "pruning_params": {},
                "target": "flops",
            },
            args,
            kwargs,
        )
        super().__init__(
            model,
            config_list,
            **judges(given),
            log_dir=given["log_dir"],
            keep_intermediate_result=given["keep_intermediate_result"],
        )
        if given["target"] not in ("flops", "params"):
            raise ConfigError(f"target {given['target']!r} is not one of flops, params")
        budget = {"flops": "macs", "params": "params"}[given["target"]]
        fine_tune = self.finetuner
        self._problem = self.problem(
            budget, given["pruning_algorithm"], self.inputs("AMCPruner"), self._score, fine_tune
        )
        self.search = AMC(
            episodes=total_episode,
            warmup=min(int(given["ddpg_params"].get("warmup", 100)), total_episode),
            reward=lambda score, cost: score - 1.0,
            agent=_agent(given["ddpg_params"]),
        )

    def _score(self, model: nn.Module) -> float:
        value = self.score(model)
        if value is None:
            raise ConfigError("the search needs an evaluation: evaluating_func of the evaluator")
        return value

    def compress(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Search; the model itself stays as it is, the result is a small one."""
        storage = self.log_dir / "amc" if self.keep else None
        return self.ended(run_search(self._problem, self.search, storage=storage))


def _agent(given: Mapping[str, Any]) -> AgentOptions:
    """Return the agent's settings from NNI's names; some (``window_length``, ``epsilon``) have no meaning here."""
    names = {
        "hidden1": "hidden",
        "lr_c": "critic_rate",
        "lr_a": "actor_rate",
        "bsize": "batch",
        "rmsize": "memory",
        "tau": "share",
        "discount": "discount",
        "init_delta": "noise",
        "delta_decay": "noise_decay",
    }
    unused = {"hidden2", "warmup", "window_length", "max_episode_length", "epsilon", "seed"}
    for name in given:
        if name not in names and name not in unused:
            raise ConfigError(f"ddpg_params: there is no {name!r}{did_you_mean(name, names)}")
    return AgentOptions(**{names[name]: value for name, value in given.items() if name in names})


def seen_inputs(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Any, ...]:
    """Return the positional inputs of the first call of a model while a function runs it.

    Raises:
        ConfigError: The function does not call the model, or calls it with keyword inputs only.
    """
    seen: list[tuple[Any, ...]] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args) if not seen else None)
    try:
        with torch.no_grad(), modes_kept(model):
            run(model)
    finally:
        handle.remove()
    if not seen or not seen[0]:
        raise ConfigError(
            "the evaluator must call the model with positional inputs, from which its channels are found"
        )
    return seen[0]


class NetAdaptPruner(_SearchPruner):
    """In each round every layer is cut so far that a step of the cost is won; the best after short training stays.

    Yang et al., "NetAdapt" (https://arxiv.org/abs/1804.03230). NNI 1.x; the cost are the parameters.

    Args:
        model: The model, only read; the result is a small one.
        config_list: One ``sparsity``: the share of the parameters that goes.
        short_term_fine_tuner: ``f(model)``.
        evaluator: ``f(model)`` gives a score.
        optimize_mode: ``maximize`` or ``minimize`` the score.
        base_algo: ``l1``, ``l2`` or ``fpgm``.
        sparsity_per_iteration: The step of the first round.
        experiment_data_dir: Keeps the trials; a search that was killed goes on there.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        short_term_fine_tuner: Callable[[nn.Module], Any],
        evaluator: Callable[[nn.Module], float],
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        sparsity_per_iteration: float = 0.05,
        experiment_data_dir: str | None = "./",
    ) -> None:
        super().__init__(model, config_list, scorer=_signed(evaluator, optimize_mode))
        inputs = seen_inputs(model, evaluator)
        assert self.scorer is not None
        self._problem = self.problem("params", base_algo, inputs, self.scorer, short_term_fine_tuner)
        self.search = NetAdapt(step=sparsity_per_iteration)
        self.storage = None if experiment_data_dir in (None, "./") else experiment_data_dir

    def compress(self) -> nn.Module:  # type: ignore[override]
        """Search; return the small model."""
        return self.ended(run_search(self._problem, self.search, storage=self.storage))[0]


class SensitivityPruner(_SearchPruner):
    """Measures how much each layer's cut costs, then cuts all by an equal drop of the score. NNI 1.x.

    Args:
        model: The model, only read; the result is a small one.
        config_list: One ``sparsity``: the share of the parameters that goes.
        evaluator: ``f(model)`` gives a score, higher is better.
        finetuner: ``f(model)`` trains the result.
        base_algo: ``l1``, ``l2`` or ``fpgm``.
        sparsity_proportion_calc: Not supported: the curves give the proportions.
        sparsity_per_iter: Distance of the measured ratios.
        acc_drop_threshold: A layer is not cut further once the score fell by more.
        checkpoint_dir: Keeps the trials.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[..., float],
        finetuner: Callable[..., Any] | None = None,
        base_algo: str = "l1",
        sparsity_proportion_calc: Any = None,
        sparsity_per_iter: float = 0.1,
        acc_drop_threshold: float = 0.05,
        checkpoint_dir: str | None = None,
    ) -> None:
        if sparsity_proportion_calc is not None:
            raise ConfigError("sparsity_proportion_calc: the measured curves give the proportions")
        if not 0 < sparsity_per_iter <= 1:
            raise ConfigError(f"sparsity_per_iter {sparsity_per_iter} is not above 0 and up to 1")
        super().__init__(model, config_list, finetuner=finetuner, scorer=evaluator)
        self.base_algo, self.storage = base_algo, checkpoint_dir
        count = max(round(1.0 / sparsity_per_iter), 1)
        steps = tuple((number + 1) / count for number in range(count))
        self.search = Sensitivity(steps=steps, stop_drop=acc_drop_threshold)

    def compress(  # type: ignore[override]
        self,
        eval_args: Any = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Any = None,
        finetune_kwargs: Mapping[str, Any] | None = None,
        resume_sensitivity: str | None = None,
    ) -> nn.Module:
        """Measure, cut and train; return the small model.

        Args:
            eval_args: Further arguments of the evaluator.
            eval_kwargs: Further keyword arguments of the evaluator.
            finetune_args: Further arguments of the fine-tuner.
            finetune_kwargs: Further keyword arguments of the fine-tuner.
            resume_sensitivity: A folder of trials, as ``checkpoint_dir``.
        """
        assert self.scorer is not None
        scorer = self.scorer

        def evaluate(model: nn.Module) -> float:
            return float(scorer(model, *(eval_args or ()), **(eval_kwargs or {})))

        inputs = seen_inputs(self.bound_model, evaluate)
        problem = self.problem("params", self.base_algo, inputs, evaluate, None)
        model = self.ended(run_search(problem, self.search, storage=resume_sensitivity or self.storage))[0]
        if self.finetuner is not None:
            self.finetuner(model, *(finetune_args or ()), **(finetune_kwargs or {}))
        return model


def _signed(evaluator: Callable[[nn.Module], float], optimize_mode: str) -> Callable[[nn.Module], float]:
    if optimize_mode not in ("maximize", "minimize"):
        raise ConfigError(f"optimize_mode {optimize_mode!r} is not one of maximize, minimize")
    return evaluator if optimize_mode == "maximize" else lambda model: -float(evaluator(model))
