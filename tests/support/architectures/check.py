"""What is checked of one model of the catalogue: everything that the promise "any architecture, proven" says.

The sweep (``benchmarks/zoo.py``) runs all of it on every model, ``make test`` most of it on a sample.
"""

from __future__ import annotations

import copy
import importlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import dwindle as dw
from dwindle.config.errors import DwindleError
from dwindle.graph.stand_ins import copied
from support.architectures.example import Builder, Example
from support.independent import compare, enliven

LIBRARIES = {
    "own": "hand_written",
    "torchvision": "torchvision_models",
    "timm": "timm_models",
    "hf": "hugging_face",
}
RATIO = 0.5
#: Largest difference that counts as equal, relative to the largest output, by precision of the proof.
EQUAL = {"float64": 1e-9, "float32": 1e-4}
ONNX_EQUAL = 1e-4
#: A model with a smaller share of its parameters on prunable axes needs a reason in the table.
LOW_SHARE = 0.95


def names(library: str | None = None) -> list[str]:
    """Every model of the catalogue as ``library/name``."""
    return [f"{own}/{name}" for own in LIBRARIES if library in (None, own) for name in _models(own)]


def example_of(name: str, seed: int = 0) -> Example:
    """Build one model of the catalogue."""
    library, _, own = name.partition("/")
    torch.manual_seed(seed)
    return _models(library)[own]()


def _models(library: str) -> dict[str, Builder]:
    return importlib.import_module(f"support.architectures.{LIBRARIES[library]}").MODELS


@dataclass(slots=True)
class Row:
    """What was found for one model. Seconds are wall time; shares are of parameter elements.

    Attributes:
        model: ``library/name``.
        parameters: Number of parameter elements before.
        captured: How it was recorded: ``"meta"`` (without computing), ``"real"``, or empty where it failed.
        training_captured: Whether the training mode was recorded too.
        prunable_share: Share on axes that may shrink.
        reasons: Where that is low: the largest reasons, with the share of the parameters that each holds.
        in_place: Whether the result is still an object of the user's class; None where nothing was pruned.
        left: Share of the parameters left at ratio 0.5.
        cuts: Number of axes that were cut.
        proof_difference: Of dwindle's own proof.
        proof_dtype: Its precision.
        batch_sizes: Batch sizes of the proof.
        mask_inside: Number of operators that had the mask applied inside the reference.
        exact_left: Share left when only exact axes are cut, for the independent proof.
        independent_difference: Of the small model and an eager copy with masked parameters, on exact axes.
        independent_moved: How far masking moved the outputs there.
        trains: Whether a training step moved parameters in training mode, and the model runs in evaluation mode.
        onnx_difference: Largest difference of ONNX Runtime and torch, relative to the largest output.
        onnx_before: Where the small model has no ONNX form: whether the model had one before it was pruned.
        unknown: Operators without a rule.
        notes: What dwindle told the user.
        seconds: Of each step.
        failures: What went wrong, by step.
        note: From the catalogue.
    """

    model: str
    parameters: int = 0
    captured: str = ""
    training_captured: bool = False
    prunable_share: float = 0.0
    reasons: dict[str, float] = field(default_factory=dict)
    in_place: bool | None = None
    left: float = 1.0
    cuts: int = 0
    proof_difference: float | None = None
    proof_dtype: str = ""
    batch_sizes: list[int] = field(default_factory=list)
    mask_inside: int = 0
    exact_left: float | None = None
    independent_difference: float | None = None
    independent_moved: float | None = None
    trains: bool | None = None
    onnx_difference: float | None = None
    onnx_before: bool | None = None
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether the model was captured, pruned, proven by both proofs, and trains."""
        return not set(self.failures) - {"onnx"}

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**asdict(self), "passes": self.passes}


def check(name: str, *, independent: bool = True, onnx: bool = True) -> Row:
    """Prune one model of the catalogue to half, and check all that is promised.

    Args:
        name: ``library/name``.
        independent: Also make the independent proof on exact axes.
        onnx: Also export the small model and run it in ONNX Runtime.
    """
    row = Row(name)
    started = time.perf_counter()
    example = example_of(name)
    row.note = example.note
    row.seconds["build"] = time.perf_counter() - started
    row.parameters = sum(parameter.numel() for parameter in example.model.parameters())
    original = copied(example.model)
    result = _prune(example, row)
    if result is not None:
        small = result.model
        _step(row, "trains", lambda: _train(small, example, row))
        if onnx:
            _step(row, "onnx", lambda: _onnx(small, original, example, row))
        del small, result
        example = replace(example, model=original)  # the largest models need the memory
    if independent and "prune" not in row.failures:
        _step(row, "independent", lambda: _independent(original, example, row))
    return row


def _step(row: Row, step: str, function: Any) -> None:
    started = time.perf_counter()
    try:
        function()
    except Exception as error:
        row.failures[step] = f"{type(error).__name__}: {str(error).strip()[:600]}"
    row.seconds[step] = time.perf_counter() - started


def _prune(example: Example, row: Row) -> dw.ShrinkResult | None:
    """Prune and fill in what the result says; None where it failed (the model must be untouched then)."""
    model = example.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    started = time.perf_counter()
    try:
        result = dw.prune(model, example.args, example_kwargs=example.kwargs, ratio=RATIO)
    except DwindleError as error:
        row.failures["prune"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
        after = model.state_dict()
        if list(after) != list(before) or not all(_same(after[key], held) for key, held in before.items()):
            row.failures["untouched"] = "the model was changed although pruning failed"
        return None
    except Exception as error:
        row.failures["prune"] = f"crash: {type(error).__name__}: {str(error).strip()[:600]}"
        return None
    finally:
        row.seconds["prune"] = time.perf_counter() - started
    row.seconds.update({f"prune.{step}": seconds for step, seconds in result.seconds.items()})
    analysis = result.analysis
    row.captured = analysis.trace.executed_on
    row.training_captured = len(analysis.traces) > 1
    row.prunable_share = analysis.prunable_share()
    if row.prunable_share < LOW_SHARE:
        row.reasons = frozen_reasons(result)
    row.left = result.parameters_after / max(result.parameters_before, 1)
    row.cuts = len(result.plan.cuts)
    row.unknown = sorted({node.name for node in analysis.scope.unknown})
    row.notes = [note[:300] for note in result.notes]
    if row.cuts:
        row.in_place = not result.plan.rewritten and type(result.model) is type(model)
    if result.verification is not None:
        row.proof_difference = result.verification.max_difference
        row.proof_dtype = result.verification.dtype
        row.batch_sizes = result.verification.batch_sizes
        row.mask_inside = len(result.verification.inside)
        if not result.verification.max_difference <= EQUAL[row.proof_dtype]:
            row.failures["proof"] = f"difference {result.verification.max_difference:.3g}"
    else:
        row.failures["proof"] = "no proof was made"
    if not row.cuts and not any("nothing was cut" in note for note in result.notes):
        row.failures["silent"] = "nothing was cut and no note says so"
    return result


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return (
        torch.equal(first, second)
        if not first.is_floating_point()
        else torch.equal(first.nan_to_num(), second.nan_to_num())
    )


def frozen_reasons(result: dw.ShrinkResult, largest: int = 3) -> dict[str, float]:
    """Return the main reasons why parameters lie on no axis that may shrink, with the share of each.

    A parameter counts for the reason of its longest axis.
    """
    analysis = result.analysis
    held: Counter[str] = Counter()
    total = 0
    for name, value in analysis.trace.parameters.items():
        if value.kind != "parameter":
            continue
        total += math.prod(value.shape)
        infos = [
            analysis.by_axis[leaf]
            for axis in analysis.parameter_axes[name]
            for leaf in axis.leaves()
            if leaf in analysis.by_axis
        ]
        if infos and not any(info.selected for info in infos):
            longest = max(infos, key=lambda info: info.size)
            held[longest.frozen_reason or "too small"] += math.prod(value.shape)
        elif not infos:
            held["single numbers"] += math.prod(value.shape)
    return {reason: count / max(total, 1) for reason, count in held.most_common(largest)}


def _train(model: nn.Module, example: Example, row: Row) -> None:
    """One step in training mode on all outputs, then a forward in evaluation mode."""
    args, kwargs = example.training or (example.args, example.kwargs)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    row.trains = False
    if not trainable:
        row.trains = True
        return
    before = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    torch.manual_seed(1)
    outputs = list(_float_outputs(model.train()(*_copied(args), **_copied(kwargs))))
    losses = [output for output in outputs if output.requires_grad]
    if not losses:
        raise RuntimeError("no output depends on a trainable parameter in training mode")
    sum((output.double() - 1).square().mean() for output in losses).backward()
    optimizer.step()
    moved = sum(bool((a != b).any()) for a, b in zip(before, trainable, strict=True))
    if not moved:
        raise RuntimeError("a training step moved no parameter")
    with torch.no_grad():
        list(_float_outputs(model.eval()(*_copied(example.args), **_copied(example.kwargs))))
    row.trains = True


def _copied(tree: Any) -> Any:
    return copy.deepcopy(tree)


def _float_outputs(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point() or tree.is_complex():
            yield tree.abs() if tree.is_complex() else tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _float_outputs(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _float_outputs(item)
    elif hasattr(tree, "__dataclass_fields__"):
        for key in tree.__dataclass_fields__:
            yield from _float_outputs(getattr(tree, key))


def _onnx(small: nn.Module, original: nn.Module, example: Example, row: Row) -> None:
    """Export the small model, run it in ONNX Runtime and compare with torch; where that fails, try the original."""
    try:
        row.onnx_difference = _exported_difference(small, example)
    except Exception:
        row.onnx_before = True
        try:
            _exported_difference(copied(original), example)
        except Exception:
            row.onnx_before = False
        raise


def _exported_difference(model: nn.Module, example: Example) -> float:
    with tempfile.TemporaryDirectory() as directory:
        exported = dw.export(
            model.eval(),
            Path(directory) / "small.onnx",
            tuple(example.args) if example.args else dict(example.kwargs),
            example_kwargs=dict(example.kwargs) if example.args else None,
            tolerance=ONNX_EQUAL,
        )
    return exported.relative_difference


def _independent(original: nn.Module, example: Example, row: Row) -> None:
    """Cut only exact axes of a fresh copy, and compare with an eager copy whose parameters are masked.

    Where a removed head width was compensated in the weights, float32 rounds the factor: then the whole cut is made
    in double precision.
    """
    enliven(original)
    try:
        _compare_exact(original, example, row)
    except _Differs:
        _compare_exact(copy.deepcopy(original).double(), _double(example), row)


class _Differs(RuntimeError):
    """The small model is not the eager masked copy."""


def _double(example: Example) -> Example:
    def widen(item: Any) -> Any:
        is_float = isinstance(item, torch.Tensor) and item.is_floating_point()
        return item.double() if is_float else item

    args, kwargs = pytree.tree_map(widen, (example.args, example.kwargs))
    return Example(example.model, args, kwargs)


def _compare_exact(original: nn.Module, example: Example, row: Row) -> None:
    result = dw.prune(
        copy.deepcopy(original),
        example.args,
        example_kwargs=example.kwargs,
        ratio=RATIO,
        exact=True,
        verify=False,
    )
    row.exact_left = result.parameters_after / max(result.parameters_before, 1)
    if not result.plan.cuts:
        return
    found = compare(
        original, result.model, result.plan.to_json()["keep"], example, training=False, batches=(2,)
    )
    row.independent_difference, row.independent_moved = found.difference, found.moved
    if not found.moved > 0:
        raise RuntimeError("masking moved no output: the comparison says nothing")
    if not found.difference <= EQUAL["float64"]:
        raise _Differs(f"the eager masked copy differs by {found.difference:.3g}")
