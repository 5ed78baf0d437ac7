"""Making it real: surgery on the user's own module, the proof, ``dw.realize`` and ``dw.prune``."""

from dwindle.realize.plan import Plan
from dwindle.realize.prune import prune
from dwindle.realize.realize import realize
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import Verification

__all__ = ["Plan", "ShrinkResult", "Verification", "apply_plan", "prune", "realize"]
