"""Search: which ratio each coupled axis of a model gets, or how many bits each layer, by trials under a budget.

One trial interface (:class:`Problem`, :func:`run_search`), and on it the searches of the literature. The package is
made so that its trials can be sent to other processes: a proposal is a list of counts, a trial is plain data.
"""

from dwindle.search.affine_ranking import LeGR
from dwindle.search.amc import AMC
from dwindle.search.annealing import SimulatedAnnealing
from dwindle.search.auto import AutoResult, Candidate, Limit, Training
from dwindle.search.auto_compress import AutoCompress
from dwindle.search.auto_q import AutoQ, search_bits
from dwindle.search.bit_problem import BitProblem
from dwindle.search.ddpg import AgentOptions
from dwindle.search.latency_prediction import LatencyPredictor, latency_predictor
from dwindle.search.netadapt import NetAdapt
from dwindle.search.problem import Problem
from dwindle.search.result import SearchResult
from dwindle.search.running import Algorithm, Outcome, Proposal, Search, run_search
from dwindle.search.sensitivities import SensitivityPoint, SensitivityResult, SensitivityTarget
from dwindle.search.sensitivity import Sensitivity
from dwindle.search.space import Space, Variable
from dwindle.search.storage import TrialStore
from dwindle.search.studies import (
    Assessment,
    Hopeless,
    StudyResult,
    StudyTrial,
    Subject,
    SubjectMaker,
    load_study,
    run_study,
    work_on_study,
)
from dwindle.search.trial import Trial, sensitivity_curves

__all__ = [
    "AMC",
    "AgentOptions",
    "Algorithm",
    "Assessment",
    "AutoCompress",
    "AutoQ",
    "AutoResult",
    "BitProblem",
    "Candidate",
    "Hopeless",
    "LatencyPredictor",
    "LeGR",
    "Limit",
    "NetAdapt",
    "Outcome",
    "Problem",
    "Proposal",
    "Search",
    "SearchResult",
    "Sensitivity",
    "SensitivityPoint",
    "SensitivityResult",
    "SensitivityTarget",
    "SimulatedAnnealing",
    "Space",
    "StudyResult",
    "StudyTrial",
    "Subject",
    "SubjectMaker",
    "Training",
    "Trial",
    "TrialStore",
    "Variable",
    "latency_predictor",
    "load_study",
    "run_search",
    "run_study",
    "search_bits",
    "sensitivity_curves",
    "work_on_study",
]
