"""The cost model: latency of a cut model in a runtime, from times of its layers that are kept for this machine."""

from dwindle.search.latency_prediction.calibration import Calibration, PredictionError
from dwindle.search.latency_prediction.predictor import LatencyPredictor, SlowCut
from dwindle.search.latency_prediction.preparing import latency_predictor

__all__ = ["Calibration", "LatencyPredictor", "PredictionError", "SlowCut", "latency_predictor"]
