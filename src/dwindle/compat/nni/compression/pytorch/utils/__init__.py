"""``nni.compression.pytorch.utils`` of NNI 2.x."""

from dwindle.compat.nni.v2.sensitivity import SensitivityAnalysis, apply_compression_results

__all__ = ["SensitivityAnalysis", "apply_compression_results"]
