"""``nni.compression.experiment`` of NNI 2.10."""

from dwindle.compat.nni.experiment import CompressionExperiment, CompressionExperimentConfig

__all__ = ["CompressionExperiment", "CompressionExperimentConfig"]
