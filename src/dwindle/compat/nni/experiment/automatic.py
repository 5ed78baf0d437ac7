"""NNI's automatic compression: one nested search space over pruners, quantizers and their settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dwindle.compat.nni.experiment.configs import CompressionConfig, CompressionExperimentConfig
from dwindle.compat.nni.experiment.executing import PRUNERS, QUANTIZERS, Materials, Step
from dwindle.compat.nni.experiment.running import Experiment
from dwindle.compat.nni.experiment.subject import CompressionSubject
from dwindle.compat.nni.v2.evaluator import by_epoch
from dwindle.config.callables import import_callable
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.search.studies import SubjectMaker

__all__ = [
    "AbstractAutoCompressionModule",
    "AutoCompressionExperiment",
    "AutoCompressionSearchSpaceGenerator",
    "make_subject",
]


class AbstractAutoCompressionModule(ABC):
    """What the user writes: where the model, its evaluation and its training come from."""

    @classmethod
    @abstractmethod
    def model(cls) -> nn.Module:
        """Return the trained model."""

    @classmethod
    @abstractmethod
    def evaluator(cls) -> Callable[[nn.Module], float]:
        """Return ``f(model)``, which gives the metric."""

    @classmethod
    def dummy_input(cls) -> Any:
        """Return example inputs; without them pruned models stay masked, and nothing is counted or timed."""
        return None

    @classmethod
    def optimizer_factory(cls) -> Callable[[Iterable[Any]], torch.optim.Optimizer] | None:
        """Return ``f(parameters)``, which makes an optimizer."""
        return None

    @classmethod
    def criterion(cls) -> Callable[..., Any] | None:
        """Return the loss."""
        return None

    @classmethod
    def sparsifying_trainer(cls, compress_algorithm_name: str) -> Callable[..., Any] | None:
        """Return ``f(model, optimizer, criterion, epoch)`` for algorithms that train while they compress."""
        return None

    @classmethod
    def post_compress_finetuning_trainer(cls, compress_algorithm_name: str) -> Callable[..., Any] | None:
        """Return ``f(model, optimizer, criterion, epoch)`` for what comes behind."""
        return None

    @classmethod
    def post_compress_finetuning_epochs(cls, compress_algorithm_name: str) -> int:
        """Return how many epochs that has."""
        return 0


class AutoCompressionSearchSpaceGenerator:
    """Makes the search space: pruners and quantizers to choose from, their settings open or fixed.

    A trial has one pruner and one quantizer where both are given, in this order; NNI has the one or the other. ``None``
    among the quantizers (``add_config(None, [])``) lets trials go without.
    """

    def __init__(self) -> None:
        self.pruners: list[dict[str, Any]] = []
        self.quantizers: list[dict[str, Any]] = []

    def add_config(
        self, algorithm_name: str | None, config_list: Sequence[Mapping[str, Any]], **algo_kwargs: Any
    ) -> None:
        """Add an algorithm.

        Args:
            algorithm_name: In NNI's words: ``level``, ``slim``, ``l1``, ``l2``, ``fpgm``, ``taylorfo``, ``apoz``,
                ``mean_activation``, ``naive``, ``observer``, ``qat``, ``dorefa``, ``lsq``; None: no quantizer.
            config_list: Its config; a value may be ``{"_type": "uniform", "_value": [0.1, 0.9]}`` and the like.
            algo_kwargs: Its arguments, likewise.

        Raises:
            ConfigError: There is no such algorithm.
        """
        known = {**PRUNERS, **QUANTIZERS}
        if algorithm_name is not None and algorithm_name not in known:
            hint = did_you_mean(algorithm_name, known)
            raise ConfigError(f"there is no algorithm {algorithm_name!r}; known are {', '.join(known)}{hint}")
        own = self.pruners if algorithm_name in PRUNERS else self.quantizers
        entry = {
            "config_list": [dict(config) for config in config_list],
            "arguments": dict(algo_kwargs),
        }
        own.append({"_name": algorithm_name or "none", **entry})

    def dumps(self) -> dict[str, Any]:
        """Return the search space."""
        found = {}
        for name, own in (("pruner", self.pruners), ("quantizer", self.quantizers)):
            if own:
                found[name] = {"_type": "choice", "_value": own}
        return found

    def loads(self, search_space: Mapping[str, Any]) -> None:
        """Take over a search space that :meth:`dumps` gave."""
        self.pruners = list(search_space.get("pruner", {}).get("_value", []))
        self.quantizers = list(search_space.get("quantizer", {}).get("_value", []))


class AutoCompressionExperiment(Experiment):
    """Searches the space of a generator.

    Args:
        auto_compress_module: The user's class.
        config_or_platform: The configuration, or ``"local"``. Its ``compression_setting`` may have targets.
    """

    def __init__(
        self,
        auto_compress_module: type[AbstractAutoCompressionModule],
        config_or_platform: CompressionExperimentConfig | str | None = None,
    ) -> None:
        given = config_or_platform
        own = (
            given
            if isinstance(given, CompressionExperimentConfig)
            else CompressionExperimentConfig(given or "local")
        )
        self.config, self.module = own, auto_compress_module

    def subject(self) -> CompressionSubject:
        """Return what is searched."""
        space = self.config.search_space
        if not space or not {"pruner", "quantizer"} & set(space):
            raise ConfigError(
                "config.search_space is empty; let an AutoCompressionSearchSpaceGenerator make one"
            )
        own = self.module
        setting = self.config.compression_setting
        materials = Materials(
            own.model(),
            own.evaluator(),
            None,
            own.dummy_input(),
            None,
            own.optimizer_factory(),
            own.criterion(),
            setting.runtime if setting.latency is not None else None,
        )
        return _ModuleSubject(own, materials, space, setting, self._way())

    @property
    def _maker(self) -> SubjectMaker | None:  # type: ignore[override]
        name = self.module.__qualname__
        if "<" in name or self.module.__module__ == "__main__":
            return None
        setting = self.config.compression_setting
        targets = {key: getattr(setting, key) for key in ("params", "flops", "latency", "metric", "runtime")}
        return SubjectMaker(
            "dwindle.compat.nni.experiment.automatic:make_subject",
            {
                "module": f"{self.module.__module__}:{name}",
                "search_space": self.config.search_space,
                "targets": targets,
                "way": self._way(),
            },
        )


def make_subject(
    module: str, search_space: dict[str, Any], targets: dict[str, Any], way: str
) -> CompressionSubject:
    """Make the subject in any process.

    Args:
        module: ``package.module:Class`` of the user's class.
        search_space: What a generator gave.
        targets: ``params``, ``flops``, ``latency``, ``metric`` and ``runtime``.
        way: ``maximize`` or ``minimize``.
    """
    own: Any = import_callable(module, "module")
    config = CompressionExperimentConfig(
        compression_setting=CompressionConfig(**targets), search_space=search_space
    )
    config.tuner.class_args["optimize_mode"] = way
    return AutoCompressionExperiment(own, config).subject()


class _ModuleSubject(CompressionSubject):
    """A subject whose training depends on the algorithm."""

    def __init__(
        self,
        module: type[AbstractAutoCompressionModule],
        materials: Materials,
        space: Mapping[str, Any],
        targets: CompressionConfig,
        way: Any,
    ) -> None:
        super().__init__(materials, space, self._steps, targets, way)
        self._module = module

    def _steps(self, candidate: Mapping[str, Any]) -> tuple[Step | None, Step | None]:
        steps: dict[str, Step | None] = {}
        for kind in ("pruner", "quantizer"):
            chosen = candidate.get(kind, {"_name": "none"})
            found = None
            if chosen["_name"] != "none":
                found = Step(chosen["_name"], chosen["config_list"], chosen["arguments"])
            steps[kind] = found
        self._train_as(steps["pruner"] or steps["quantizer"])
        return steps["pruner"], steps["quantizer"]

    def _train_as(self, step: Step | None) -> None:
        """Let the materials have the trainers that the user's class has for an algorithm."""
        if step is None:
            return
        own, materials = self._module, self.materials
        sparsifying, after = (
            own.sparsifying_trainer(step.name),
            own.post_compress_finetuning_trainer(step.name),
        )
        epochs = own.post_compress_finetuning_epochs(step.name)
        materials.trainer = None if sparsifying is None else by_epoch(sparsifying)
        materials.finetuner = None
        if after is not None and epochs:

            def finetune(model: nn.Module) -> None:
                if materials.optimizer is None:
                    raise ConfigError("post_compress_finetuning_trainer needs optimizer_factory")
                optimizer = materials.optimizer(model.parameters())
                for epoch in range(epochs):
                    after(model, optimizer, materials.criterion, epoch)

            materials.finetuner = finetune
