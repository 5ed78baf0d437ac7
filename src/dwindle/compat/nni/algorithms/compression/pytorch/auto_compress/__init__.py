"""``nni.algorithms.compression.pytorch.auto_compress``, the automatic compression of NNI 2.3 to 2.6."""

from dwindle.compat.nni.experiment.automatic import (
    AbstractAutoCompressionModule,
    AutoCompressionExperiment,
    AutoCompressionSearchSpaceGenerator,
)

__all__ = [
    "AbstractAutoCompressionModule",
    "AutoCompressionExperiment",
    "AutoCompressionSearchSpaceGenerator",
]
