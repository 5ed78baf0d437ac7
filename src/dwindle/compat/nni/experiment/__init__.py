"""NNI's experiments that compress: which algorithm, which ratios, which bits, under targets, as studies of dwindle."""

from dwindle.compat.nni.experiment.automatic import (
    AbstractAutoCompressionModule,
    AutoCompressionExperiment,
    AutoCompressionSearchSpaceGenerator,
)
from dwindle.compat.nni.experiment.configs import (
    CompressionConfig,
    CompressionExperimentConfig,
    FPGMPrunerConfig,
    L1NormPrunerConfig,
    L2NormPrunerConfig,
    ObserverQuantizerConfig,
    PrunerConfig,
    QATQuantizerConfig,
    QuantizerConfig,
    TaylorFOWeightPrunerConfig,
)
from dwindle.compat.nni.experiment.running import CompressionExperiment

__all__ = [
    "AbstractAutoCompressionModule",
    "AutoCompressionExperiment",
    "AutoCompressionSearchSpaceGenerator",
    "CompressionConfig",
    "CompressionExperiment",
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
