"""What to compress and how: ``config_list`` entries, the targets they select, and the errors they can have.

The history of a model stands in :mod:`dwindle.config.history`, errors in :mod:`dwindle.config.errors`.
"""

from dwindle.config.granularity import Granularity
from dwindle.config.resolution import excluded_modules, resolve
from dwindle.config.schema import (
    Align,
    DistillationSetting,
    FactorizationSetting,
    PruningSetting,
    QuantizationSetting,
)
from dwindle.config.target_rules import aligned_mask
from dwindle.config.targets import Target

__all__ = [
    "Align",
    "DistillationSetting",
    "FactorizationSetting",
    "Granularity",
    "PruningSetting",
    "QuantizationSetting",
    "Target",
    "aligned_mask",
    "excluded_modules",
    "resolve",
]
