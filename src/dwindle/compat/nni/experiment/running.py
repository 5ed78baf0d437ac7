"""``CompressionExperiment`` of NNI 2.10: which pruner, which ratio for each module, which quantizer, under targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni.experiment.configs import CompressionExperimentConfig
from dwindle.compat.nni.experiment.executing import Materials, Step
from dwindle.compat.nni.experiment.subject import CompressionSubject
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.search.studies import Direction, StudyResult, SubjectMaker, run_study

__all__ = ["CompressionExperiment", "Experiment"]

_TUNERS = {"TPE": "tpe", "Random": "random", "Evolution": "nsga2"}


class Experiment:
    """What experiments have in common: a configuration, and the way to a result.

    Attributes:
        config: May be changed until :meth:`run`.
        result: The study, after :meth:`run`.
    """

    config: CompressionExperimentConfig
    result: StudyResult | None = None
    _maker: SubjectMaker | None = None

    def subject(self) -> CompressionSubject:
        """Return what is searched."""
        raise NotImplementedError

    def run(self, port: int = 8080, wait_completion: bool = True, debug: bool = False) -> bool:
        """Run the trials; return True when a trial meets every target.

        Args:
            port: Taken and not needed, as are the others: ``optuna-dashboard`` shows the storage.
            wait_completion: See above.
            debug: See above.

        Raises:
            ConfigError: Something of the configuration does not fit.
        """
        config, tuner = self.config, self.config.tuner
        if tuner.name not in _TUNERS:
            hint = did_you_mean(tuner.name, _TUNERS)
            raise ConfigError(f"there is no tuner {tuner.name!r} here; known are {', '.join(_TUNERS)}{hint}")
        if config.trial_concurrency > 1 and (self._maker is None or config.storage is None):
            raise ConfigError(
                "trial_concurrency: trials at the same time need config.storage, and an AutoCompressionExperiment "
                "whose module can be imported"
            )
        self.result = run_study(
            self._maker if config.trial_concurrency > 1 and self._maker is not None else self.subject(),
            trials=config.max_trial_number,
            name=config.experiment_name,
            storage=config.storage,
            sampler=_TUNERS[tuner.name],
            seed=int(tuner.class_args.get("seed", 0)),
            workers=config.trial_concurrency,
        )
        return bool(self.result.front)

    start = run

    def stop(self) -> None:
        """Do nothing: no server runs."""

    def export_data(self) -> list[dict[str, Any]]:
        """Return what NNI exports: ``parameter``, ``value`` and ``trialJobId`` of each finished trial."""
        return [
            {
                "parameter": trial.candidate,
                "value": {"default": value, **trial.costs},
                "trialJobId": str(trial.number),
            }
            for trial in self._finished().trials
            for value in list(trial.values.values())[:1]
        ]

    def best_model(self) -> nn.Module:
        """Make the model of the best trial again, in evaluation mode.

        Raises:
            DwindleError: No trial meets every target.
        """
        candidate = self._finished().best.candidate
        assert candidate is not None
        return self.subject().build(candidate)

    def _finished(self) -> StudyResult:
        if self.result is None:
            raise ConfigError("the experiment was not run yet")
        return self.result

    def _way(self) -> Direction:
        mode = self.config.tuner.class_args.get("optimize_mode", "maximize")
        if mode not in ("maximize", "minimize"):
            raise ConfigError(f"optimize_mode {mode!r} is not maximize or minimize")
        return "maximize" if mode == "maximize" else "minimize"


class CompressionExperiment(Experiment):
    """Searches a pruner, a ratio for each module and a quantizer, under targets.

    NNI adds sigmoids of what is left of each figure; here the metric is made as good as can be, every target being met.

    Args:
        config_or_platform: The configuration; ``"local"`` stands for an empty one.
        model: The model; it is not changed.
        finetuner: ``f(model)`` trains a compressed model.
        evaluator: ``f(model)`` gives the metric.
        dummy_input: Example inputs.
        trainer: ``f(model, optimizer, criterion)`` for pruners that watch a training.
        optimizer: ``f(parameters)`` makes an optimizer; or an optimizer, and others of its kind and options are made.
        criterion: The loss.
        device: Where the model is.
    """

    def __init__(
        self,
        config_or_platform: CompressionExperimentConfig | str | None,
        model: nn.Module,
        finetuner: Callable[[nn.Module], Any] | None,
        evaluator: Callable[[nn.Module], float],
        dummy_input: Any = None,
        trainer: Callable[..., Any] | None = None,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        given = config_or_platform
        own = (
            given
            if isinstance(given, CompressionExperimentConfig)
            else CompressionExperimentConfig(given or "local")
        )
        self.config = own
        self.materials = Materials(
            model if device is None else model.to(device),
            evaluator,
            finetuner,
            dummy_input,
            trainer,
            _factory(optimizer),
            criterion,
        )

    def subject(self) -> CompressionSubject:
        """Return what is searched."""
        setting = self.config.compression_setting
        self.materials.runtime = setting.runtime if setting.latency is not None else None
        space = self.config.search_space or setting.space(self.materials.model)
        return CompressionSubject(self.materials, space, _steps, setting, self._way())


def _steps(candidate: Mapping[str, Any]) -> tuple[Step | None, Step | None]:
    """The pruner and the quantizer of a candidate."""
    ratios = [
        {"op_names": [key.removeprefix("module_name::")], "sparsity_per_layer": float(value)}
        for key, value in candidate.items()
        if key.startswith("module_name::")
    ]
    pruner = quantizer = None
    if "pruners" in candidate:
        rest = {key: own for key, own in candidate["pruners"].items() if key not in ("_name", "pruner_type")}
        pruner = Step(candidate["pruners"]["pruner_type"], ratios, rest)
    chosen = candidate.get("quantizers", {"quantizer_type": "none"})
    if chosen["quantizer_type"] != "none":
        bits = chosen["quant_bits"]
        types = ["weight"] if chosen["quantizer_type"] == "NaiveQuantizer" else ["weight", "input", "output"]
        entry = {
            "op_types": ["Conv2d", "Linear"],
            "quant_types": types,
            "quant_bits": dict.fromkeys(types, bits),
        }
        quantizer = Step(chosen["quantizer_type"], [entry], {})
    return pruner, quantizer


def _factory(optimizer: Any) -> Callable[[Any], torch.optim.Optimizer] | None:
    """How an optimizer for other parameters is made."""
    if optimizer is None or not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer  # type: ignore[no-any-return]
    kind, options = type(optimizer), dict(optimizer.defaults)
    return lambda parameters: kind(parameters, **options)
