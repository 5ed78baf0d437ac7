"""From kept indices to a plan, a proof and a smaller model in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dwindle.config import history
from dwindle.factorization.result import FactorizationResult
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.blocks import Block
from dwindle.graph.counts import CountSolver
from dwindle.graph.positions import kept_positions
from dwindle.graph.stand_ins import copied, empty_caches
from dwindle.realize.configuration import Configuration, blueprint_of, configure
from dwindle.realize.depth import zero_branches
from dwindle.realize.depth_plan import write_blocks
from dwindle.realize.depth_proof import prove_depth
from dwindle.realize.experts import ExpertCut, left_mixtures, masking, write_experts
from dwindle.realize.experts_proof import prove_experts
from dwindle.realize.optimizer import carry_over
from dwindle.realize.plan import AttributeChange, Plan
from dwindle.realize.precision import proof_dtype, widened_copy
from dwindle.realize.repairing.report import RepairReport
from dwindle.realize.rewrite import rewrite
from dwindle.realize.scales import Scaling, apply_scalings, plan_scalings
from dwindle.realize.surgery import cut, drop_blocks, tensor_slots
from dwindle.realize.training_proof import prove_in_training
from dwindle.realize.verify import Verification, prove

Keep = dict[Axis, torch.Tensor]


@dataclass(slots=True)
class ShrinkResult:
    """The small model, what was cut, what was proven and what could not shrink.

    Attributes:
        model: The small model (the user's own module, or a rewritten graph).
        plan: What was cut, replayable.
        verification: The proof; None when it was switched off.
        analysis: The axes the cut was made on.
        parameters_before: Number of parameter elements before.
        parameters_after: Number after.
        seconds: Wall time of each step: ``capture``, ``analyse``, ``shrink``, ``prove``.
        notes: What the user should know.
        configuration: Whether the model's own config describes it; None for models that have none.
        repair: What :func:`dwindle.repair` did afterwards; None where it was not asked for.
        factorization: Which layers became chains of learned ranks afterwards; None where none was to.
    """

    model: nn.Module
    plan: Plan
    verification: Verification | None
    analysis: Analysis
    parameters_before: int
    parameters_after: int
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    configuration: Configuration | None = None
    repair: RepairReport | None = None
    factorization: FactorizationResult | None = None

    @property
    def frozen(self) -> list[dict[str, Any]]:
        """Axes (residual blocks, experts) that nothing may be removed from, with the reason and the source line."""
        axes = [
            {
                "size": info.size,
                "kind": info.kind,
                "parameters": [f"{name}[{dim}]" for name, dim in info.parameter_dims],
                "reason": info.frozen_reason,
                "line": info.source_line,
            }
            for info in self.analysis.axes
            if info.frozen_reason is not None and not info.trivial
        ]
        return (
            axes
            + [
                {
                    "size": len(block.stage),
                    "kind": "block",
                    "parameters": [block.path],
                    "reason": block.reason,
                    "line": block.where,
                }
                for block in self.analysis.blocks
                if block.reason is not None
            ]
            + [
                {
                    "size": mixture.size,
                    "kind": "expert",
                    "parameters": [f"{name}[{dim}]" for name, dim in mixture.tensors.items()] + mixture.lists,
                    "reason": mixture.reason,
                    "line": mixture.where,
                }
                for mixture in self.analysis.mixtures
                if mixture.reason is not None
            ]
        )

    def summary(self) -> str:
        """Return a readable account."""
        share = self.parameters_after / max(self.parameters_before, 1)
        lines = [f"parameters {self.parameters_before:,} -> {self.parameters_after:,} ({share:.1%})"]
        for entry in self.plan.cuts:
            places = ", ".join(entry["parameters"][:3]) + (", ..." if len(entry["parameters"]) > 3 else "")
            lines.append(f"  {entry['kind']:<13} {entry['before']:>5} -> {entry['after']:<5} {places}")
        if self.verification is not None:
            v = self.verification
            lines.append(
                f"proven equal to {v.reference}: max difference {v.max_difference:.2g} in {v.dtype}, "
                f"batch sizes {', '.join(map(str, v.batch_sizes))}"
            )
        if self.factorization is not None:
            lines += self.factorization.summary().splitlines()[:1]
        if self.repair is not None:
            lines += self.repair.summary().splitlines()[:2]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data (without the model)."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "cuts": self.plan.cuts,
            "frozen": self.frozen,
            "verification": self.verification.to_json() if self.verification else None,
            "seconds": self.seconds,
            "notes": self.notes,
            "configuration": self.configuration.to_json() if self.configuration else None,
            "repair": self.repair.to_json() if self.repair else None,
            "factorization": self.factorization.to_json() if self.factorization else None,
        }


def make_plan(analysis: Analysis, solver: CountSolver, keep: Keep) -> Plan:
    """Return what to cut, given which indices of each leaf stay."""
    plan = Plan()
    for name, axes in analysis.parameter_axes.items():
        dims = {}
        for dim, axis in enumerate(axes):
            index = kept_positions(axis, keep, analysis.memory)
            if index is not None:
                dims[dim] = index
        if dims:
            plan.keep[name] = dims
    owners = analysis.trace.owners
    for trace in analysis.traces[1:]:
        owners = {**trace.owners, **owners}
    counts = {leaf: int(chosen.sum()) for leaf, chosen in keep.items()}
    for attribute, number in solver.attributes(counts).items():
        path, _ = owners[attribute.owner]
        plan.attributes.append(
            AttributeChange(path, attribute.key, attribute.index, attribute.number, number)
        )
    for info in analysis.axes:
        if info.axis in counts:
            places = [f"{name}[{dim}]" for name, dim in info.parameter_dims]
            plan.cuts.append(
                {"kind": info.kind, "before": info.size, "after": counts[info.axis], "parameters": places}
            )
    return plan


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def zero_removed(model: nn.Module, plan: Plan) -> None:
    """Mask a model as the plan says: zeros wherever something would be cut (statistics are left alone)."""
    slots = tensor_slots(model)
    with torch.no_grad():
        for name, dims in plan.keep.items():
            module, key = slots[name][0]
            tensor = getattr(module, key)
            if not isinstance(tensor, nn.Parameter):
                continue
            for dim, index in dims.items():
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
                gone[index] = False
                tensor.data.movedim(dim, 0)[gone] = 0
    zero_branches(model, plan.blocks)


def liven(model: nn.Module, seed: int = 0) -> None:
    """Randomise parameters and statistics that are still constant, so that a proof on them is not vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if (
                tensor.is_floating_point()
                and tensor.numel() > 1
                and bool((tensor == tensor.flatten()[0]).all())
            ):
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                tensor.data.add_(noise * 0.5 + 0.1)


def shrink(
    model: nn.Module,
    analysis: Analysis,
    solver: CountSolver,
    keep: Keep,
    *,
    optimizer: torch.optim.Optimizer | None,
    verify: bool,
    mask: Callable[[nn.Module, Plan], None],
    prepare: Callable[[nn.Module], None] = lambda model: None,
    biases: dict[str, torch.Tensor] | None = None,
    rewritten: bool = False,
    blocks: Sequence[Block] = (),
    experts: Sequence[ExpertCut] = (),
) -> ShrinkResult:
    """Prove and carry out a cut, in place.

    Args:
        model: The user's model; unchanged when anything fails.
        analysis: Its axes.
        solver: Constraints between counts, for the attributes.
        keep: Which indices of each cut leaf stay.
        optimizer: A live optimizer that goes on with the small model.
        verify: Whether to prove equality first.
        mask: Masks a copy of the model, as the reference of the proof.
        prepare: Called on every copy, and on the model, before the cut.
        biases: Constants of removed channels to add to the bias of a module, by module path, as a full-size
            vector of the module's outputs.
        rewritten: Emit the recorded graph instead of changing the model, which is then left as it is.
        blocks: Residual blocks that go. Their entries are taken out of the lists they stand in; where that is
            not proven equal, because the code counts on their places, a pass-through stands in for each.
        experts: Which experts stay in mixtures that lose some.

    Raises:
        RealizeError: The small model is not equal to the masked one.
    """
    started = time.perf_counter()
    notes: list[str] = []
    plan = make_plan(analysis, solver, keep)
    plan.rewritten = rewritten
    before = count_parameters(model)
    plan.biases = {
        path: int(delta.numel())
        for path, delta in (biases or {}).items()
        if model.get_submodule(path).bias is None
    }
    for path in plan.biases:
        kept = plan.keep.get(f"{path}.weight" if path else "weight", {}).get(0)
        if kept is not None:
            plan.keep[f"{path}.bias" if path else "bias"] = {0: kept}
    depth = write_blocks(plan, model, analysis, blocks, delete=True)
    mixtures = write_experts(plan, model, analysis, experts, left_mixtures(analysis, blocks))
    # a rewritten graph goes on with the number that was recorded
    scalings = [] if rewritten else plan_scalings(plan, analysis, solver, keep)
    seconds = {"plan": time.perf_counter() - started}

    def make_small(copy: nn.Module) -> nn.Module:
        return _cut(copy, plan, analysis, keep, biases or {}, prepare, scalings)[0]

    verification = None
    if verify:
        started = time.perf_counter()

        def proven() -> Verification:
            masked = widened_copy(model, proof_dtype(model))
            mask(masked, plan)
            return prove(analysis, keep, masked, make_small, masking=masking(experts))

        verification = prove_depth(model, analysis, plan, depth, blocks, proven, notes)
        if biases is None and not rewritten and not experts:
            # constants that were folded hold for running statistics only, so masks of the user's own stay out of it
            masked = widened_copy(model, proof_dtype(model))
            mask(masked, plan)
            note = prove_in_training(analysis, keep, masked, make_small)
            notes += [note] if note else []
        notes += prove_experts(model, analysis, mixtures, experts) if experts else []
        verification.seconds = seconds["prove"] = time.perf_counter() - started
    stand_ins = [removal.path for removal in plan.blocks if not removal.deleted]
    if stand_ins:
        notes.append(
            f"a pass-through stands in the place of {', '.join(stand_ins)}, which the code counts on"
        )
    started = time.perf_counter()
    blueprint = None if rewritten or plan.is_empty() else blueprint_of(model)
    body = copied(model) if rewritten else model
    twins = list(zip(model.parameters(), body.parameters(), strict=True)) if rewritten else []
    removes = bool(plan.blocks or plan.entries)
    owned = list(body.parameters()) if removes else []
    small, replaced = _cut(body, plan, analysis, keep, biases or {}, prepare, scalings)
    for old, twin in twins:
        replaced[old] = replaced.pop(twin, (twin, {}))
    if optimizer is not None:
        alive = set(small.parameters()) if removes else set()
        dropped = [old for old in owned if (replaced[old][0] if old in replaced else old) not in alive]
        added = [body.get_submodule(path).bias for path in plan.biases]
        carry_over(optimizer, replaced, added, dropped)  # type: ignore[arg-type]
    seconds["shrink"] = seconds.pop("plan") + time.perf_counter() - started
    configuration = None
    if blueprint is not None:
        started = time.perf_counter()
        counts = {leaf: int(chosen.sum()) for leaf, chosen in keep.items()}
        configuration = configure(small, blueprint, analysis, solver, plan, counts, verify=verify)
        notes.append(configuration.note())
        seconds["configure"] = time.perf_counter() - started
    for entry in history.history(model) if rewritten else []:
        history.record(small, entry)
    history.record(small, {"kind": "shrink", "plan": plan.to_json()})
    return ShrinkResult(
        small,
        plan,
        verification,
        analysis,
        before,
        count_parameters(small),
        seconds,
        [*analysis.notes, *notes],
        configuration,
    )


def _cut(
    model: nn.Module,
    plan: Plan,
    analysis: Analysis,
    keep: Keep,
    biases: dict[str, torch.Tensor],
    prepare: Callable[[nn.Module], None],
    scalings: list[Scaling],
) -> tuple[nn.Module, dict[torch.Tensor, tuple[torch.Tensor, Mapping[int, torch.Tensor]]]]:
    """Make the small model from ``model`` (changed); returns it and what replaced which parameter."""
    prepare(model)
    folded = _fold(model, biases)
    replaced, undo = cut(model, plan)
    apply_scalings(model, plan.keep, scalings)
    if not plan.rewritten:
        drop_blocks(model, plan, undo)
    empty_caches(model, analysis.trace.caches)
    for old, new in folded.items():
        replaced[old] = replaced.pop(new, (new, {}))
    return (rewrite(model, analysis, keep) if plan.rewritten else model), replaced


def _fold(model: nn.Module, biases: dict[str, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """Add constants of removed channels to biases (before the cut, at full size); returns old to new."""
    folded: dict[torch.Tensor, torch.Tensor] = {}
    for path, delta in biases.items():
        module: Any = model.get_submodule(path)
        weight = module.weight
        delta = delta.to(weight.dtype).to(weight.device)
        old = module.bias
        new = nn.Parameter(delta.clone() if old is None else old.detach() + delta)
        module.register_parameter("bias", new)
        if isinstance(old, torch.Tensor):
            new.requires_grad_(old.requires_grad)
            folded[old] = new
    return folded
