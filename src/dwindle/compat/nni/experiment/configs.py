"""What a compression experiment of NNI 2.10 is configured with: targets, scope, and the algorithms to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = [
    "CompressionConfig",
    "CompressionExperimentConfig",
    "FPGMPrunerConfig",
    "L1NormPrunerConfig",
    "L2NormPrunerConfig",
    "ObserverQuantizerConfig",
    "PrunerConfig",
    "QATQuantizerConfig",
    "QuantizerConfig",
    "TaylorFOWeightPrunerConfig",
]


@dataclass
class PrunerConfig:
    """A pruner to choose.

    Attributes:
        pruner_type: Its class.
        mode: ``normal``, ``dependency_aware`` or ``global``.
    """

    pruner_type: str = ""
    mode: str = "dependency_aware"

    def json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


@dataclass
class L1NormPrunerConfig(PrunerConfig):
    """Channels with the smallest L1 norm go."""

    pruner_type: str = "L1NormPruner"


@dataclass
class L2NormPrunerConfig(PrunerConfig):
    """Channels with the smallest L2 norm go."""

    pruner_type: str = "L2NormPruner"


@dataclass
class FPGMPrunerConfig(PrunerConfig):
    """Channels nearest to the geometric median go."""

    pruner_type: str = "FPGMPruner"


@dataclass
class TaylorFOWeightPrunerConfig(PrunerConfig):
    """Channels by the first-order change of the loss.

    Attributes:
        training_batches: Steps of training that are watched.
    """

    pruner_type: str = "TaylorFOWeightPruner"
    training_batches: int = 30


@dataclass
class QuantizerConfig:
    """A quantizer to choose (a placeholder in NNI; here it is done).

    Attributes:
        quantizer_type: Its class.
        quant_bits: Of weights and activations.
    """

    quantizer_type: str = ""
    quant_bits: int = 8

    def json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


@dataclass
class ObserverQuantizerConfig(QuantizerConfig):
    """After training; ranges come from what the evaluator shows the model."""

    quantizer_type: str = "ObserverQuantizer"


@dataclass
class QATQuantizerConfig(QuantizerConfig):
    """In a further run of the finetuner."""

    quantizer_type: str = "QAT_Quantizer"


@dataclass
class CompressionConfig:
    """Targets, scope and algorithms.

    Attributes:
        params: The most of the parameters that may stay: a share (float), or a number (int).
        flops: The most of the multiply-accumulates that may stay, likewise.
        latency: The most of the latency in ``runtime`` that may stay, as a share.
        metric: The least of the metric that must stay, as a share.
        module_types: Modules of these types are pruned, each by a ratio of its own.
        module_names: So are these.
        exclude_module_names: These are not.
        pruners: Pruners to choose from; None prunes nothing.
        quantizers: Quantizers to choose from; None in the list stands for none.
        runtime: Where latency is measured.
        largest_ratio: Of a module; NNI draws up to 1, at which nothing of a module is left.
    """

    params: int | float | None = None
    flops: int | float | None = None
    latency: float | None = None
    metric: float | None = None
    module_types: Sequence[type[nn.Module] | str] | None = None
    module_names: Sequence[str] | None = None
    exclude_module_names: Sequence[str] | None = None
    pruners: Sequence[PrunerConfig] | None = None
    quantizers: Sequence[QuantizerConfig | None] | None = None
    runtime: str = "onnxruntime"
    largest_ratio: float = 0.9

    def names(self, model: nn.Module) -> list[str]:
        """Return the modules that are pruned.

        Raises:
            ConfigError: A name is not there.
        """
        types = {own if isinstance(own, str) else own.__name__ for own in self.module_types or ()}
        modules = dict(model.named_modules())
        for name in (*(self.module_names or ()), *(self.exclude_module_names or ())):
            if name not in modules:
                raise ConfigError(f"the model has no module {name!r}{did_you_mean(name, modules)}")
        named = {*(self.module_names or ())}
        found = [name for name, own in modules.items() if name in named or type(own).__name__ in types]
        return [name for name in found if name not in (self.exclude_module_names or ())]

    def space(self, model: nn.Module) -> dict[str, Any]:
        """Return NNI's search space: a ratio for each module, a pruner, a quantizer."""
        found: dict[str, Any] = {}
        if self.pruners:
            for name in self.names(model):
                found[f"module_name::{name}"] = {"_type": "uniform", "_value": [0, self.largest_ratio]}
            if len(found) == 0:
                raise ConfigError("module_types and module_names select no module to prune")
            found["pruners"] = {"_type": "choice", "_value": _named(self.pruners, "pruner_type")}
        if self.quantizers:
            found["quantizers"] = {"_type": "choice", "_value": _named(self.quantizers, "quantizer_type")}
        if not found:
            raise ConfigError("give pruners or quantizers to choose from")
        return found


def _named(configs: Sequence[Any], key: str) -> list[dict[str, Any]]:
    """Choices with names of their own, by which results are told apart."""
    found = []
    for place, own in enumerate(configs):
        fields = {key: "none"} if own is None else own.json()
        same = [
            other
            for other in configs[:place]
            if other is not None and own is not None and type(other) is type(own)
        ]
        found.append({"_name": fields[key] + (f" {len(same) + 1}" if same else ""), **fields})
    return found


@dataclass
class _Tuner:
    """NNI's tuner.

    Attributes:
        name: ``TPE``, ``Random`` or ``Evolution``.
        class_args: ``optimize_mode``: ``maximize`` or ``minimize`` the metric; ``seed``.
    """

    name: str = "TPE"
    class_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class CompressionExperimentConfig:
    """An experiment.

    Attributes:
        training_service_platform: ``local``; other machines join with ``dwindle worker``.
        compression_setting: See there.
        experiment_name: Names the study.
        max_trial_number: How many trials.
        trial_concurrency: How many at the same time.
        search_space: In place of the one that follows from ``compression_setting``.
        tuner: See there.
        storage: Where trials are kept: SQLite file, ``journal:PATH``, database URL; None keeps nothing.
        training_service: Taken and not needed, as is ``trial_code_directory``.
        trial_code_directory: See above.
    """

    training_service_platform: str = "local"
    compression_setting: CompressionConfig = field(default_factory=CompressionConfig)
    experiment_name: str = "compression"
    max_trial_number: int = 20
    trial_concurrency: int = 1
    search_space: dict[str, Any] | None = None
    tuner: _Tuner = field(default_factory=_Tuner)
    storage: str | None = None
    training_service: Any = None
    trial_code_directory: Any = None

    def __post_init__(self) -> None:
        if self.training_service_platform != "local":
            raise ConfigError(
                f"platform {self.training_service_platform!r}: trials run on this machine ('local'); "
                "others join through the storage, with dwindle worker"
            )
