"""Paths of NNI 1.x and 2.x."""

from dwindle.compat.nni.paths import imported_on_use

__getattr__ = imported_on_use(__name__)
