"""``nni.compression.experiment.config`` of NNI 2.10."""

from dwindle.compat.nni.experiment.configs import (
    CompressionConfig,
    CompressionExperimentConfig,
    FPGMPrunerConfig,
    L1NormPrunerConfig,
    L2NormPrunerConfig,
    ObserverQuantizerConfig,
    QATQuantizerConfig,
    TaylorFOWeightPrunerConfig,
)

__all__ = [
    "CompressionConfig",
    "CompressionExperimentConfig",
    "FPGMPrunerConfig",
    "L1NormPrunerConfig",
    "L2NormPrunerConfig",
    "ObserverQuantizerConfig",
    "QATQuantizerConfig",
    "TaylorFOWeightPrunerConfig",
]
