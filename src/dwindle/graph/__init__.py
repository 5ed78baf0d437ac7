"""Recording a model and working out its axes: what depends on what, and what may shrink.

``analyse(model, args, kwargs)`` is the way in; :mod:`dwindle.graph.inspect` prints what it found.
"""

from dwindle.graph.analysis import Analysis, AxisInfo, analyse
from dwindle.graph.capture import capture
from dwindle.graph.recorder import record
from dwindle.graph.rules.registry import register_axis_rule

__all__ = ["Analysis", "AxisInfo", "analyse", "capture", "record", "register_axis_rule"]
