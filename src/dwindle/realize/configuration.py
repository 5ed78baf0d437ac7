"""After a prune: the config that describes the small model, so that its own library saves and loads it.

The integers are found by building (:mod:`dwindle.realize.config_search`); the result is proven: the model that the
new config builds, with the small model's weights, gives the small model's outputs in float64. Where a number that
was stored when the model was built (a temperature) comes out differently, the weights take up the change first
(:mod:`dwindle.graph.scales`). Nothing changes where any of this fails; the reason is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from dwindle.graph.analysis import Analysis
from dwindle.graph.counts import Counts, CountSolver
from dwindle.graph.expressions import Attribute, Dimension, Expression, describe, evaluate
from dwindle.graph.nodes import Node
from dwindle.graph.origins import Elements
from dwindle.graph.scales import ScaleFinder, expression_key, scale_of
from dwindle.realize.blueprint import (
    Blueprint,
    Setting,
    Sizes,
    describes_itself,
    is_config,
    label_of,
    sizes_of,
)
from dwindle.realize.config_search import ConfigSearch, NotDescribedError
from dwindle.realize.plan import AttributeChange, Plan
from dwindle.realize.precision import proof_dtype, widened_copy
from dwindle.realize.scales import Scaling, after_cut, apply_scalings, enter, scalings_of
from dwindle.realize.surgery import apply_settings
from dwindle.realize.verify import TOLERANCE, difference, outputs_of, random_inputs

_MOST_PROOFS = 3
_MORE_BUILDS = 40
_LONGEST = 16


@dataclass(slots=True)
class Configuration:
    """Whether the model's config describes the small model.

    Attributes:
        described: The model's class, given ``model.config``, builds the small model: ``save_pretrained`` and
            ``from_pretrained`` give it back.
        settings: Integers of the config that changed: name to value before and after.
        reason: Why not, when it is not described.
        difference: Largest difference between the rebuilt and the small model; None when it was not proven.
    """

    described: bool
    settings: dict[str, tuple[int | None, int]] = field(default_factory=dict)
    reason: str = ""
    difference: float | None = None

    def note(self) -> str:
        """Return one line for the user."""
        if not self.described:
            return (
                f"config: it cannot describe the small model ({self.reason}); save it with dwindle.save, not with "
                "save_pretrained. uniform=True asks for a cut that a config can describe"
            )
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.settings.items())
        proof = "not proven" if self.difference is None else f"proven: difference {self.difference:.2g}"
        return f"config: {changes or 'unchanged'}; from_pretrained builds the small model ({proof})"

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "described": self.described,
            "settings": {name: list(pair) for name, pair in self.settings.items()},
            "reason": self.reason,
            "difference": self.difference,
        }


def blueprint_of(model: nn.Module) -> Blueprint | None:
    """Return what builds models like ``model`` (as it is now); None where it has no config of its own."""
    return Blueprint(model) if describes_itself(model) else None


def configure(
    small: nn.Module,
    blueprint: Blueprint,
    analysis: Analysis,
    solver: CountSolver,
    plan: Plan,
    counts: Counts,
    *,
    verify: bool,
) -> Configuration:
    """Make the config of a model that was just cut describe it, if any config can. The plan is extended.

    Args:
        small: The user's model, already cut.
        blueprint: Made from it before the cut.
        analysis: Its axes before the cut.
        solver: Constraints between counts.
        plan: What was cut; settings and scales are added to it.
        counts: How many indices of each axis stay.
        verify: Whether to prove the result.
    """
    try:
        return _Configuring(small, blueprint, analysis, solver, plan, counts, verify).run()
    except NotDescribedError as error:
        return Configuration(False, reason=str(error))
    except Exception as error:  # foreign code that builds models: it must never spoil a prune that succeeded
        return Configuration(False, reason=f"{type(error).__name__}: {error}")


class _Configuring:
    def __init__(
        self,
        small: nn.Module,
        blueprint: Blueprint,
        analysis: Analysis,
        solver: CountSolver,
        plan: Plan,
        counts: Counts,
        verify: bool,
    ) -> None:
        self.counts = counts
        self.small, self.blueprint, self.analysis = small, blueprint, analysis
        self.solver, self.plan, self.verify = solver, plan, verify
        self.paths = {id(module): path for path, module in small.named_modules()}
        self.owners: dict[int, tuple[str, Any]] = {}
        for trace in analysis.traces:
            self.owners.update(trace.owners)
        for change in plan.lists:
            keys = change.owner.split(".")
            if "config" in keys:
                own = _resolve(small, change.owner)
                blueprint.lists[*keys[keys.index("config") + 1 :], change.key] = vars(own)[change.key]

    def run(self) -> Configuration:
        self._check_base()
        started = self._without_blocks()
        search = ConfigSearch(self.blueprint, self.target())
        search.check_uniform()
        reason = "no integers of its config give its sizes"
        for number, values in enumerate(search.solutions()):
            if number >= _MOST_PROOFS:
                break
            self.blueprint.remaining = min(self.blueprint.remaining, _MORE_BUILDS)
            try:
                found = self._adopt(values, search)
                found.settings = {**started, **found.settings}
                return found
            except NotDescribedError as error:
                reason = str(error)
                if error.final:
                    break
        raise NotDescribedError(reason)

    def _without_blocks(self) -> dict[str, tuple[int | None, int]]:
        """Start from the config that counts the blocks and experts that are left, where the plan says how.

        Returns:
            The integers that this changes: name to value before and after.
        """
        root = self.small.config
        prefixes: dict[int, tuple[str, ...]] = {
            id(held): (key,) for key, held in vars(root).items() if is_config(held)
        }
        prefixes[id(root)] = ()
        values: dict[Setting, int] = {}
        before: dict[Setting, int] = {}
        for change in self.plan.attributes if self.plan.blocks or self.plan.entries else []:
            try:
                owner = _resolve(self.small, change.owner)
            except (AttributeError, KeyError):
                continue  # inside a block that is gone
            prefix = prefixes.get(id(owner))
            old, new = change.old, change.new
            if prefix is not None and isinstance(old, int) and isinstance(new, int):
                place: Setting = () if change.index is None else (change.index,)
                setting: Setting = (*prefix, change.key, *place)
                values[setting], before[setting] = new, old
        blueprint = self.blueprint.starting_from(values) if values else None
        if blueprint is None:
            return {}
        self.blueprint = blueprint
        return {label_of(setting): (before[setting], number) for setting, number in values.items()}

    def _check_base(self) -> None:
        """The class must build the model as it was from the config as it was."""
        base = self.blueprint.sizes({})
        kind = self.blueprint.name
        if base is None:
            raise NotDescribedError(f"{kind} cannot be built from its own config")
        for name, value in self.analysis.trace.parameters.items():
            for dim, size in enumerate(value.shape):
                if value.kind == "parameter" and base.get(("tensor", name, dim)) != size:
                    raise NotDescribedError(f"{kind}(config) did not build {name!r} as it was before")

    def target(self) -> Sizes:
        """Sizes of the small model: its tensors, its lists, and the integers that its code was seen to use."""
        found = {key: size for key, size in sizes_of(self.small).items() if key[0] in ("tensor", "list")}
        for attribute in self.solver.definitions:
            _, owner = self.owners.get(attribute.owner, ("", None))
            if id(owner) in self.paths:
                held = vars(owner)[attribute.key]
                number = held if attribute.index is None else held[attribute.index]
                found[("attribute", self.paths[id(owner)], attribute.key, attribute.index)] = int(number)
        return found

    def _adopt(self, values: dict[Setting, int], search: ConfigSearch) -> Configuration:
        """Prove one config and give it to the model.

        Raises:
            NotDescribedError: The model that it builds is another one.
        """
        device = next((str(parameter.device) for parameter in self.small.parameters()), "cpu")
        built = self.blueprint.build(values, device).eval()
        state = self.small.state_dict()
        if set(built.state_dict()) != set(state):
            odd = sorted(set(built.state_dict()) ^ set(state))
            raise NotDescribedError(f"only one of the two models has {odd[0]!r}")
        factors = list(self._factors(built))
        scalings = [scaling for _, own, _, _ in factors for scaling in own]
        changes = _differences(self.small, built)
        changes += [
            AttributeChange(path, key, None, old, new) for path, key, old, new in _floats(self.small, built)
        ]
        gap = None
        if self.verify:
            gap = self._prove(built, changes, scalings)
        undo = apply_settings(self.small, changes)
        try:
            apply_scalings(self.small, {}, scalings)
        except Exception:
            undo()
            raise
        self.plan.settings += changes
        for label, own, old, new in factors:
            enter(self.plan, own, label, old, new)
        present = search.present
        return Configuration(
            True,
            {label_of(setting): (present[setting], number) for setting, number in values.items()},
            "",
            gap,
        )

    def _factors(self, built: nn.Module) -> Iterator[tuple[str, list[Scaling], float, float]]:
        """Factors that the rebuilt model computes otherwise, and the weights that take up the change.

        Raises:
            NotDescribedError: No weight can.
        """
        scope = self.analysis.scope
        known: dict[Any, list[tuple[Node, Expression]]] = {}
        for node, expression in scope.scales:
            known.setdefault(expression_key(expression), []).append((node, expression))
        finder: ScaleFinder | None = None
        compensations = {expression_key(own.expression): own for own in self.analysis.compensations}
        for key, expression in [
            *((key, own.expression) for key, own in compensations.items()),
            *((key, entries[0][1]) for key, entries in known.items()),
        ]:
            old, new = (float(evaluate(expression, self._values(model))) for model in (self.small, built))
            if old == new:
                continue
            found = compensations.get(key)
            if found is None:
                finder = finder or ScaleFinder(self.analysis.traces)
                scales = [scale_of(node, own) for node, own in known[key]]
                useful = [scale for scale in scales if scale is not None]
                found = finder.find(useful) if len(useful) == len(scales) else None
            if found is None:
                raise NotDescribedError(
                    f"{describe(expression)} would be {new:.6g} instead of {old:.6g}, and no weight can take up "
                    "the change"
                )
            yield describe(expression), self._here(found.places, new / old), old, new

    def _values(self, model: nn.Module) -> Callable[[Attribute | Dimension], Any]:
        """Values of the variables of expressions in the small model, or in the one that was rebuilt."""
        sizes = self.solver.value_of(self.counts)

        def value(variable: Attribute | Dimension) -> Any:
            if isinstance(variable, Dimension):
                return sizes(variable)
            path, owner = self.owners[variable.owner]
            path = self.paths.get(id(owner), path)
            try:
                held = vars(_resolve(model, path))[variable.key]
            except (AttributeError, KeyError):
                return variable.number
            return held if variable.index is None else held[variable.index]

        return value

    def _here(self, places: list[tuple[Elements, float]], change: float) -> list[Scaling]:
        """Scalings of the small model: its names (blocks may be gone), its sizes."""
        before = {path: owner for path, owner in self.owners.values() if isinstance(owner, nn.Module)}
        found = []
        for scaling in scalings_of(places, change):
            path, _, key = scaling.parameter.rpartition(".")
            own = self.paths.get(id(before.get(path)), path)
            name = f"{own}.{key}" if own else key
            found.append(Scaling(name, after_cut(scaling, self.plan.keep), scaling.factor))
        return found

    def _prove(self, built: nn.Module, changes: list[AttributeChange], scalings: list[Scaling]) -> float:
        """Hold the rebuilt model, and the model with its new settings, against the small model.

        Raises:
            NotDescribedError: They differ.
        """
        dtype = proof_dtype(self.small)
        reference, twin = widened_copy(self.small, dtype), widened_copy(self.small, dtype)
        apply_settings(twin, changes)
        apply_scalings(twin, {}, scalings)
        own = _kept_out(built)
        built = widened_copy(built, dtype)
        built.load_state_dict(twin.state_dict(), strict=True)
        variants = random_inputs(self.analysis, dtype, 0)
        try:
            outputs_of(reference, variants, dtype)
        except Exception:
            variants = random_inputs(self.analysis, dtype, 0, ())  # code that fixes the batch size
        with torch.random.fork_rng(devices=[]):
            outputs = []
            for model in (reference, twin, built):
                torch.manual_seed(0)
                outputs.append(outputs_of(model, variants, dtype))
        gap = max(difference(outputs[0], outputs[1]), difference(outputs[0], outputs[2]))
        if gap > TOLERANCE[dtype]:
            raise self._why(own, gap)
        return gap

    def _why(self, own: dict[str, torch.Tensor], gap: float) -> NotDescribedError:
        """What of the rebuilt model is not in its weights and differs."""
        buffers = dict(self.small.named_buffers())
        for name, tensor in own.items():
            if name in buffers and not torch.equal(tensor, buffers[name]):
                reason = f"{name!r} is computed anew from the config, with other numbers"
                return NotDescribedError(reason, final=True)
        return NotDescribedError(
            f"the model that its config builds gives other outputs: the difference is {gap:.3g}"
        )


def _resolve(model: nn.Module, path: str) -> Any:
    own: Any = model
    for part in path.split(".") if path else []:
        own = getattr(own, part)
    return own


def _kept_out(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are not saved with the weights."""
    state = model.state_dict()
    return {name: tensor for name, tensor in model.named_buffers() if name not in state}


def _floats(small: nn.Module, built: nn.Module) -> Iterator[tuple[str, str, float, float]]:
    """Numbers of modules that differ between the two models: path, key, old, new."""
    modules = dict(small.named_modules())
    for path, module in built.named_modules():
        fields = vars(modules[path]) if path in modules else {}
        for key, new in vars(module).items():
            old = fields.get(key)
            if type(new) is float and type(old) is float and math.isfinite(new) and old not in (new, 0.0):
                yield path, key, old, new


def _differences(small: nn.Module, built: nn.Module) -> list[AttributeChange]:
    """Integers of modules and configs that the rebuilt model has otherwise."""
    changes: list[AttributeChange] = []
    modules, seen = dict(small.named_modules()), set()
    for path, module in built.named_modules():
        if path not in modules:
            continue
        changes += _changes(path, vars(modules[path]), vars(module))
        for key, held in vars(module).items():
            own = vars(modules[path]).get(key)
            if is_config(held) and is_config(own) and id(own) not in seen:
                seen.add(id(own))
                changes += _config_changes(f"{path}.{key}" if path else key, own, held)
    return list({(change.owner, change.key, change.index): change for change in changes}.values())


def _config_changes(path: str, own: Any, built: Any) -> list[AttributeChange]:
    known = built.to_dict()
    changes = _changes(
        path,
        {key: held for key, held in vars(own).items() if key in known},
        {key: held for key, held in vars(built).items() if key in known},
    )
    for key, held in vars(built).items():
        inner = vars(own).get(key)
        if is_config(held) and is_config(inner):
            changes += _config_changes(f"{path}.{key}", inner, held)
    return changes


def _changes(path: str, own: Mapping[str, Any], built: Mapping[str, Any]) -> list[AttributeChange]:
    found = []
    for key, new in built.items():
        old = own.get(key)
        if type(new) is int and (type(old) is int or (old is None and key in own)):
            if new != old:
                found.append(AttributeChange(path, key, None, old, new))
        elif _is_list(new) and _is_list(old) and len(new) == len(old):
            found += [
                AttributeChange(path, key, place, before, after)
                for place, (before, after) in enumerate(zip(old, new, strict=True))
                if before != after
            ]
    return found


def _is_list(held: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return (
        isinstance(held, list | tuple) and len(held) <= _LONGEST and all(type(item) is int for item in held)
    )
