"""The proof for removed experts, on inputs that reach every expert that stays, in evaluation and training mode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.stand_ins import copied
from dwindle.realize.depth_proof import StillRandomness
from dwindle.realize.experts import ExpertCut, masking
from dwindle.realize.plan import Plan
from dwindle.realize.precision import proof_dtype, widened_copy
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import TOLERANCE, difference, outputs_of, random_inputs

#: So many sets of random inputs are tried until every expert was chosen.
_TRIES = 12


def prove_experts(model: nn.Module, analysis: Analysis, plan: Plan, cuts: Sequence[ExpertCut]) -> list[str]:
    """Show that a model without experts equals the one whose routers never choose them.

    Args:
        model: The user's model; copies of it are used.
        analysis: What was recorded of it.
        plan: A plan of the experts alone.
        cuts: Which experts stay.

    Returns:
        Notes: experts that no input of the proof reached, and why nothing was shown in training mode.

    Raises:
        RealizeError: The two differ, or the small model does not run.
    """
    dtype = proof_dtype(model)
    masked = widened_copy(model, dtype)
    small = _small(copied(masked), plan)
    missing = {cut.mixture.router: set(cut.keep.tolist()) for cut in cuts if cut.mixture.chosen}
    for seed in range(2, 2 + _TRIES):
        variants = random_inputs(analysis, dtype, seed)
        expected, taken = _masked(masked, variants, dtype, cuts, training=False)
        _compare(expected, _run(small, variants, dtype, training=False), dtype, "")
        for router, own in taken.items():
            missing.get(router, set()).difference_update(own)
        if not any(missing.values()):
            break
    notes = [
        f"experts {', '.join(map(str, sorted(left)))} scored by {router!r} were chosen for no input of the proof"
        for router, left in missing.items()
        if left
    ]
    try:
        first, _ = _masked(copied(masked).train(), variants, dtype, cuts, training=True)
        again, _ = _masked(copied(masked).train(), variants, dtype, cuts, training=True)
    except Exception as error:
        return [
            *notes,
            f"in training mode nothing was proven of the experts: the model fails there ({error})",
        ]
    if difference(first, again) > TOLERANCE[dtype]:
        return [
            *notes,
            "in training mode nothing was proven of the experts: results differ at every call there",
        ]
    _compare(first, _run(small.train(), variants, dtype, training=True), dtype, "in training mode ")
    return notes


def _small(copy: nn.Module, plan: Plan) -> nn.Module:
    try:
        return apply_plan(copy, plan)
    except RealizeError:
        raise
    except Exception as error:
        raise RealizeError(f"the experts cannot be removed ({type(error).__name__}: {error})") from error


def _masked(
    model: nn.Module, variants: Any, dtype: torch.dtype, cuts: Sequence[ExpertCut], *, training: bool
) -> tuple[list[list[torch.Tensor] | None], dict[str, set[int]]]:
    with masking(cuts)(model) as mode:
        return _outputs(model, variants, dtype, training), mode.taken


def _run(model: nn.Module, variants: Any, dtype: torch.dtype, *, training: bool) -> Any:
    try:
        return _outputs(model, variants, dtype, training)
    except Exception as error:
        raise RealizeError(
            f"the model without the experts does not run ({type(error).__name__}: {error}); "
            "the model was left as it was"
        ) from error


def _outputs(model: nn.Module, variants: Any, dtype: torch.dtype, training: bool) -> Any:
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        if training:
            stack.enter_context(StillRandomness())
        torch.manual_seed(1)
        return outputs_of(model, variants, dtype)


def _compare(expected: Any, actual: Any, dtype: torch.dtype, mode: str) -> None:
    gap = difference(expected, actual)
    if gap > TOLERANCE[dtype]:
        raise RealizeError(
            f"{mode}the model without the experts is not equal to the one whose routers never choose them: the "
            f"largest difference is {gap:.3g} (allowed {TOLERANCE[dtype]:g}); the model was left as it was"
        )
