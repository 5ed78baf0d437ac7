"""The proof: the small model computes what the masked one does.

Both run in float64 (float32 when the model is too large) on random inputs of two batch sizes. First the small
model is held against the user's own module with masked parameters; where that cannot be equal by mathematics (a
norm over a cut axis), against a replay in which the mask is applied inside those operators.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from dwindle import simulate
from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.capture import larger_batch
from dwindle.graph.outputs import main_outputs
from dwindle.graph.stand_ins import attributes_kept, copied, empty_caches, own_object
from dwindle.graph.trace import Trace
from dwindle.realize.precision import precise
from dwindle.realize.replay import Replay, eager_call

PROOF_BATCHES = (2, 3)
#: The last batch is made larger where the inputs have fewer numbers than this, up to the limit below.
PROOF_ELEMENTS = 1024
LARGEST_PROOF_BATCH = 65
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(slots=True)
class Verification:
    """What was proven.

    Attributes:
        proven: Whether the small model was shown equal to the masked one.
        max_difference: Largest absolute difference of any output element, relative to the largest output where
            that is above 1.
        dtype: ``"float64"`` or ``"float32"``.
        batch_sizes: The batch sizes that were run.
        reference: ``"the masked model itself"``, or ``"the masked model with the mask applied inside ..."``.
        inside: Operators inside which the mask was applied, with their source lines.
        seconds: Wall time of the proof.
    """

    proven: bool
    max_difference: float
    dtype: str
    batch_sizes: list[int]
    reference: str
    inside: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)


def random_inputs(
    analysis: Analysis,
    dtype: torch.dtype,
    seed: int,
    batches: tuple[int, ...] = PROOF_BATCHES,
    *,
    shuffle: bool = True,
    noisy: bool = True,
) -> list[tuple[Any, Any]]:
    """Return ``(args, kwargs)`` at each batch size (as recorded where there is none).

    Floats are noise (or those of the example), integers are shuffled values of the example (or as they are).
    """
    generator = torch.Generator().manual_seed(seed)
    recorded = analysis.example_args, analysis.example_kwargs
    if batches:
        batches = (*batches[:-1], max(batches[-1], _samples(recorded)))
    variants = [variant for size in batches if (variant := larger_batch(*recorded, size)) is not None]
    if not variants:
        variants = [recorded]

    def noise(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        if item.is_floating_point():
            made = torch.randn(item.shape, generator=generator, dtype=dtype)
            return made if noisy else item.to(dtype, copy=True)
        if item.dtype is torch.bool or item.numel() < 2 or not shuffle:
            return item.clone()
        order = torch.randint(item.numel(), (item.numel(),), generator=generator)
        return item.flatten()[order].view(item.shape)

    result = []
    for own in variants:
        leaves, spec = pytree.tree_flatten(own)
        result.append(pytree.tree_unflatten([noise(item) for item in leaves], spec))
    return result


def _samples(inputs: tuple[Any, Any]) -> int:
    """How many samples tiny inputs need: on a few numbers a rectifier may happen to be shut in all of them."""
    tensors = [item for item in pytree.tree_leaves(inputs) if isinstance(item, torch.Tensor) and item.dim()]
    elements = sum(tensor.numel() // max(tensor.shape[0], 1) for tensor in tensors)
    return min(-(-PROOF_ELEMENTS // max(elements, 1)), LARGEST_PROOF_BATCH)


def _copies(tree: Any) -> Any:
    return pytree.tree_map(
        lambda item: item.clone() if isinstance(item, torch.Tensor) else own_object(item), tree
    )


def outputs_of(
    model: nn.Module, variants: list[tuple[Any, Any]], dtype: torch.dtype
) -> list[list[torch.Tensor] | None]:
    """Run every input variant; None for one that the model itself refuses (an error when it refuses all)."""
    results: list[list[torch.Tensor] | None] = []
    with precise(dtype):
        for number, (args, kwargs) in enumerate(variants):
            torch.manual_seed(0)  # the same noise for every model that draws some
            try:
                with attributes_kept(model):
                    output = model(*_copies(args), **_copies(kwargs))
            except Exception:
                if number == len(variants) - 1 and not any(results):
                    raise
                results.append(None)
                continue
            results.append([tensor.clone() for tensor in main_outputs(output)])
    return results


def difference(first: list[list[torch.Tensor] | None], second: list[list[torch.Tensor] | None]) -> float:
    """Largest difference between two lists of outputs; infinite where shapes or presence differ."""
    worst = 0.0
    for left, right in zip(first, second, strict=True):
        if left is None:
            continue
        if right is None or len(left) != len(right):
            return float("inf")
        for a, b in zip(left, right, strict=True):
            if a.shape != b.shape:
                return float("inf")
            if a.numel() == 0:
                continue
            a, b = a.double(), b.double()
            same = (a == b) | (a.isnan() & b.isnan())
            gap = torch.where(same, torch.zeros_like(a), (a - b).abs())
            finite = a[a.isfinite()]
            scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
            worst = max(worst, float(gap.nan_to_num(float("inf")).max()) / scale)
    return worst


def replayed(
    analysis: Analysis,
    masked: nn.Module,
    keep: dict[Axis, torch.Tensor],
    variants: list[tuple[Any, Any]],
    dtype: torch.dtype,
    trace: Trace | None = None,
) -> list[list[torch.Tensor] | None]:
    """Outputs of the masked model with the mask applied inside operators that combine a cut axis.

    Args:
        analysis: The axes.
        masked: The masked model.
        keep: What is cut.
        variants: Inputs.
        dtype: Precision.
        trace: The recording to replay, where it is not that of evaluation mode.
    """
    from dwindle.realize.surgery import _held, tensor_slots

    slots = {name: _held(*holders[0]) for name, holders in tensor_slots(masked).items()}
    results: list[list[torch.Tensor] | None] = []
    device = next((tensor.device for tensor in slots.values()), torch.device("cpu"))
    with precise(dtype):
        for variant in variants:
            replay = Replay(
                analysis, trace or analysis.trace, keep, small=False, call=eager_call, device=device
            )
            inputs = [item for item in pytree.tree_leaves(_copies(variant)) if isinstance(item, torch.Tensor)]
            torch.manual_seed(0)
            flat = replay.run(lambda name: slots[name], inputs)
            results.append([tensor.clone() for tensor in flat])
    return results


def masked_inside(
    analysis: Analysis,
    masked: nn.Module,
    keep: dict[Axis, torch.Tensor],
    variants: list[tuple[Any, Any]],
    dtype: torch.dtype,
) -> list[list[torch.Tensor] | None]:
    """As :func:`replayed`, by the model's own code: where that chooses by values, no recording tells what it does."""
    from dwindle.realize.masked_run import MaskedRun

    results: list[list[torch.Tensor] | None] = []
    with precise(dtype):
        for args, kwargs in variants:
            torch.manual_seed(0)
            with attributes_kept(masked), MaskedRun(analysis, keep, masked):
                output = masked(*_copies(args), **_copies(kwargs))
            results.append([tensor.clone() for tensor in main_outputs(output)])
    return results


def prove(
    analysis: Analysis,
    keep: dict[Axis, torch.Tensor],
    masked: nn.Module,
    make_small: Callable[[nn.Module], nn.Module],
    *,
    seed: int = 0,
    masking: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> Verification:
    """Show that the small model equals the masked one.

    Args:
        analysis: The axes.
        keep: What is cut.
        masked: A copy of the model, already in the precision of the proof, in evaluation mode, with its masked
            parameters. It is consumed.
        make_small: Cuts a copy of it and returns the small model.
        seed: Of the random inputs.
        masking: Gives the context in which the masked model runs (routers that never choose removed experts).

    Raises:
        RealizeError: They differ, or the small model does not run.
    """
    dtype = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
    empty_caches(masked, analysis.trace.caches)
    inside = _inside(analysis, keep)
    twin = copied(masked) if inside else None
    if twin is not None:
        simulate.detach(twin, keep_values=True)  # the replay reads plain parameters
    with masking(masked):
        variants, expected = _expected(analysis, masked, seed, dtype)
    if not _says_something(expected) and not (
        twin is not None and _inside_says_something(analysis, twin, keep, variants, dtype, masking)
    ):
        # noise may lead nowhere; what the user gave does
        variants = random_inputs(analysis, dtype, seed, shuffle=False, noisy=False)
        with masking(masked):
            expected = outputs_of(masked, variants, dtype)
    try:
        small = make_small(masked)
        actual = outputs_of(small, variants, dtype)
    except RealizeError:
        raise
    except Exception as error:
        raise RealizeError(
            f"the small model does not run ({type(error).__name__}: {error}); the model was left as it was"
        ) from error
    # a norm of a masked row may divide zero by zero: then the reference has the mask inside
    if not _says_something(expected) and not (inside and _says_something(actual)):
        raise RealizeError(
            "nothing can be proven: the masked model gives no finite number on random inputs nor on the example; "
            "the model was left as it was"
        )
    name, tolerance = str(dtype).removeprefix("torch."), TOLERANCE[dtype]
    gap = difference(expected, actual)
    reference, used, failed = "the masked model itself", [], ""
    ran = [variant for variant, output in zip(variants, expected, strict=True) if output is not None]
    if gap > tolerance and twin is not None:
        shown = [output for output, wanted in zip(actual, expected, strict=True) if wanted is not None]
        for reference_run in (replayed, masked_inside):
            try:
                with masking(twin):
                    gap = min(gap, difference(reference_run(analysis, twin, keep, ran, dtype), shown))
            except Exception as error:
                failed = f"; with the mask inside it could not be run ({type(error).__name__}: {error})"
            if gap <= tolerance:
                break
        reference, used = "the masked model, with the mask applied inside the operators listed", inside
    if gap > tolerance:
        raise RealizeError(
            f"the small model is not equal to the masked one: the largest difference is {gap:.3g} "
            f"(allowed {tolerance:g}, {name}){failed}; the model was left as it was"
        )
    return Verification(True, gap, name, [_batch_size(variant) for variant in ran], reference, used)


def _expected(
    analysis: Analysis, masked: nn.Module, seed: int, dtype: torch.dtype
) -> tuple[list[tuple[Any, Any]], list[list[torch.Tensor] | None]]:
    """Return inputs that the masked model takes, with its outputs."""
    # code may count on the order of integers (places that stand for a picture), or fix the batch size
    choices = [(PROOF_BATCHES, True), (PROOF_BATCHES, False), ((), True), ((), False)]
    for number, (batches, shuffle) in enumerate(choices):
        variants = random_inputs(analysis, dtype, seed, batches, shuffle=shuffle)
        try:
            expected = outputs_of(masked, variants, dtype)
            break
        except Exception:
            if number == len(choices) - 1:
                raise
    return variants, expected


def _inside_says_something(
    analysis: Analysis,
    twin: nn.Module,
    keep: dict[Axis, torch.Tensor],
    variants: list[tuple[Any, Any]],
    dtype: torch.dtype,
    masking: Callable[[nn.Module], AbstractContextManager[Any]],
) -> bool:
    """Whether the reference with the mask inside gives a finite number where the plainly masked model gives none."""
    try:
        with masking(twin):
            return _says_something(replayed(analysis, twin, keep, variants, dtype))
    except Exception:
        return False


def _batch_size(variant: tuple[Any, Any]) -> int:
    leaves = pytree.tree_leaves(variant)
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)


def _says_something(results: list[list[torch.Tensor] | None]) -> bool:
    """Whether there is a finite number among the outputs to compare."""
    tensors = [tensor for result in results if result is not None for tensor in result if tensor.numel()]
    return not tensors or any(bool(tensor.isfinite().any()) for tensor in tensors)


def _inside(analysis: Analysis, keep: dict[Axis, torch.Tensor]) -> list[str]:
    """Calls that combine the indices of a cut axis."""
    nodes = set(map(id, analysis.trace.nodes))
    found = [
        f"{mixing.node.name} in {mixing.node.module or 'the root module'} at {mixing.node.where}"
        for mixing in analysis.scope.mixings
        if id(mixing.node) in nodes and any(leaf in keep for axis in mixing.axes for leaf in axis.leaves())
    ]
    return list(dict.fromkeys(found))
