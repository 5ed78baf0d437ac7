"""Making it real: surgery on the user's own module, the proof, and ``dw.prune``."""

from dwindle.realize.plan import Plan
from dwindle.realize.prune import prune
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import Verification

__all__ = ["Plan", "ShrinkResult", "Verification", "apply_plan", "prune"]
