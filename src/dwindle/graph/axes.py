"""The axis algebra: what a tensor dimension is made of, and which dimensions are the same thing.

Rules of operators only ever relate axes with the functions named here; :mod:`dwindle.graph.structures` holds what an
axis is, :mod:`dwindle.graph.unification` how two become one, :mod:`dwindle.graph.regrouping` what a reshape does.
"""

from dwindle.graph.regrouping import reshape
from dwindle.graph.structures import (
    CONCATENATION,
    INTERLEAVED,
    LEAF,
    PARALLEL,
    PRODUCT,
    UNIT,
    Axis,
    concatenation,
    factors,
    freeze,
    freeze_diagonals,
    interleaved,
    leaf,
    occurs,
    parallel,
    product,
    segments,
)
from dwindle.graph.unification import collapse, split, unify

__all__ = [
    "CONCATENATION",
    "INTERLEAVED",
    "LEAF",
    "PARALLEL",
    "PRODUCT",
    "UNIT",
    "Axis",
    "collapse",
    "concatenation",
    "factors",
    "freeze",
    "freeze_diagonals",
    "interleaved",
    "leaf",
    "occurs",
    "parallel",
    "product",
    "reshape",
    "segments",
    "split",
    "unify",
]
