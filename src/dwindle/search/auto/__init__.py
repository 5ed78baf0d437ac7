"""From a budget to the best small model: candidates that fit by measurement, a joint search, and a trained result."""

from dwindle.search.auto.automatic import auto
from dwindle.search.auto.beginning import METHODS
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.efforts import EFFORTS
from dwindle.search.auto.limits import COSTS, Limit
from dwindle.search.auto.making import Training
from dwindle.search.auto.result import AutoResult

__all__ = ["COSTS", "EFFORTS", "METHODS", "AutoResult", "Candidate", "Limit", "Training", "auto"]
