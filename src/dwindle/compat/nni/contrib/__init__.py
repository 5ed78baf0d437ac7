"""``nni.contrib``, where NNI 3.0's compression grew up."""

from dwindle.compat.nni.paths import imported_on_use

__getattr__ = imported_on_use(__name__)
