"""Studies: searches with Optuna over candidates of any kind, on one machine or many, that survive being killed."""

from dwindle.search.studies.result import StudyResult, StudyTrial
from dwindle.search.studies.running import load_study, run_study, work_on_study
from dwindle.search.studies.subject import Assessment, Direction, Hopeless, Report, Subject, SubjectMaker

__all__ = [
    "Assessment",
    "Direction",
    "Hopeless",
    "Report",
    "StudyResult",
    "StudyTrial",
    "Subject",
    "SubjectMaker",
    "load_study",
    "run_study",
    "work_on_study",
]
