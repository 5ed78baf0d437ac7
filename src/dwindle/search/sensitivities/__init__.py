"""Sensitivity: what each part of a model costs when it alone is pruned, quantized or factorized."""

from dwindle.search.sensitivities.measuring import sensitivity
from dwindle.search.sensitivities.points import SensitivityPoint, SensitivityTarget
from dwindle.search.sensitivities.result import SensitivityResult

__all__ = ["SensitivityPoint", "SensitivityResult", "SensitivityTarget", "sensitivity"]
