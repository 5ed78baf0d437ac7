"""Making it real: surgery on the user's own module, the proof, ``dw.realize`` and ``dw.prune``.

The package itself can be called: ``dw.realize(model, example_inputs)`` is :func:`dwindle.realize.from_masks.realize`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from dwindle.realize.binary_layers import PackedBinaryConv2d, PackedBinaryLinear
from dwindle.realize.depth import PassThrough
from dwindle.realize.factorize import factorize, replay_factorized
from dwindle.realize.from_masks import realize
from dwindle.realize.from_run import realize_run
from dwindle.realize.integer_layers import IntegerConvolution, IntegerLinear
from dwindle.realize.pack_binary import BinaryResult, pack_binary, replay_binary
from dwindle.realize.pack_integers import pack_integers, replay_integers
from dwindle.realize.packed_layers import pack_weights, replay_packed
from dwindle.realize.packed_linear import PackedLinear
from dwindle.realize.packing import PackResult
from dwindle.realize.plan import Plan
from dwindle.realize.prune import prune
from dwindle.realize.repair import repair
from dwindle.realize.repairing.report import LayerRepair, RepairReport
from dwindle.realize.rewrite import RewrittenModel
from dwindle.realize.rounds import Round, RoundsResult, lottery_ticket, prune_in_rounds
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.sparse_layers import SparseResult, densified, replay_sparse, sparsify
from dwindle.realize.sparse_linear import SparseLinear
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import Verification
from dwindle.training import register_realizer

__all__ = [
    "BinaryResult",
    "IntegerConvolution",
    "IntegerLinear",
    "LayerRepair",
    "PackResult",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
    "PackedLinear",
    "PassThrough",
    "Plan",
    "RepairReport",
    "RewrittenModel",
    "Round",
    "RoundsResult",
    "ShrinkResult",
    "SparseLinear",
    "SparseResult",
    "Verification",
    "apply_plan",
    "densified",
    "factorize",
    "lottery_ticket",
    "pack_binary",
    "pack_integers",
    "pack_weights",
    "prune",
    "prune_in_rounds",
    "realize",
    "repair",
    "replay_binary",
    "replay_factorized",
    "replay_integers",
    "replay_packed",
    "replay_sparse",
    "sparsify",
]


class _Callable(ModuleType):
    """Lets ``dwindle.realize(...)`` be the function although ``dwindle.realize`` is this package."""

    def __call__(self, *args: Any, **kwargs: Any) -> ShrinkResult:
        return realize(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
register_realizer(realize_run)
