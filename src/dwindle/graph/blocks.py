"""Whole residual blocks that may go: modules whose recorded calls turn x into x + branch(x).

Found in the recording alone: where the sum stands, which parameters make the branch zero, whether anything else
that the block computes is used outside. No class or library is known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwindle.graph.module_calls import ModuleCall, values_of_output
from dwindle.graph.nodes import Value
from dwindle.graph.residual import Identity, Stretches
from dwindle.graph.trace import Trace

_NORM = "a norm follows the sum: without its branch the block would still normalise its input"
_ACTIVATION = "an activation follows the sum, and its input may be negative"
_OTHER_SHAPE = "its output has another shape than its input"
_NO_SUM = "its output is not its input plus a branch that its own parameters can make zero"
_PLAIN = "torch.nn.modules.container:Sequential"
_SEVERAL = "it runs more than once in one pass"


@dataclass(eq=False, slots=True)
class Block:
    """One module that is, or looks like, a residual block.

    Attributes:
        path: Path of the module.
        stage: Paths of the blocks that stand beside it and give the same shape, itself included, in the order in
            which they run.
        parameters: Names of its parameters.
        zeroed: Parameters whose zeros make it the identity.
        source: Which argument goes through: a position, a keyword, or None when it is not an argument.
        structure: What the module returns: ``"main"`` for the tensor itself, a list for a tuple (with None and
            ``{"input": argument}`` for what else may stand in it), None when it cannot be imitated.
        chained: Whether its neighbours in the list it stands in were seen to hand their result on to one
            another, so that the entry can be taken out.
        reason: Why it stays; None when it may go.
        where: Source line behind the reason.
    """

    path: str
    stage: tuple[str, ...]
    parameters: list[str]
    zeroed: list[str] = field(default_factory=list)
    source: int | str | None = None
    structure: Any = None
    chained: bool = False
    reason: str | None = None
    where: str = ""


@dataclass(eq=False, slots=True)
class _Candidate:
    """What one recording says about one call."""

    call: ModuleCall
    main: Value | None
    identity: Identity | None
    reason: str | None


def find_blocks(traces: list[Trace]) -> list[Block]:
    """Return the residual blocks of a model, those that must stay included, in the order in which they run.

    Args:
        traces: Recordings of the same model: evaluation, then training where there is one.
    """
    views = [_View(trace) for trace in traces]
    first = views[0]
    found = {path: _judged(views, path) for path in first.calls if path and first.is_worth_a_look(path)}
    good = {path for path, candidate in found.items() if candidate.reason is None}
    first.only_alike(good)
    taken = _taken(first, good)
    shown = taken | {path for own in taken for path in first.members[first.group(own)]}
    shown |= _look_alikes(first, found, good)
    stages: dict[Any, list[str]] = {}
    for path in first.calls:
        if path in shown:
            parent, in_list, _, shape = first.group(path)
            stages.setdefault((parent, in_list, shape), []).append(path)
    return [
        _block(views, path, tuple(stage), found, path in taken) for stage in stages.values() for path in stage
    ]


class _View:
    """One recording, arranged by module."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.stretches = Stretches(trace)
        self.calls: dict[str, list[ModuleCall]] = {}
        for call in trace.calls:
            self.calls.setdefault(call.path, []).append(call)
        self.last_use: dict[int, int] = {}
        numbers = {id(node): number for number, node in enumerate(trace.nodes)}
        for node in trace.live_nodes():
            for value in node.inputs():
                self.last_use[id(value)] = numbers[id(node)]
        self.outputs = {id(value) for value in trace.outputs}
        self.judged: dict[str, _Candidate] = {}
        self.members: dict[Any, list[str]] = {}
        for path in self.calls:
            self.members.setdefault(self.group(path), []).append(path)

    def group(self, path: str) -> tuple[str, bool, str, Any]:
        """What makes modules members of one stage: parent, being in a list, class, and shape of the output."""
        call = self.calls[path][0]
        main = main_output(call)
        parent, _, key = path.rpartition(".")
        return parent, key.isdigit(), call.kind, main.shape if main is not None else None

    def only_alike(self, good: set[str]) -> None:
        """Outside lists, and among plain containers, only candidates are members of one stage."""
        for group, paths in self.members.items():
            if not group[1] or group[2] == _PLAIN:
                self.members[group] = [path for path in paths if path in good] or paths[:1]

    def is_worth_a_look(self, path: str) -> bool:
        """Whether a module runs several operators and has parameters."""
        call = self.calls[path][0]
        return call.end - call.start > 1 and bool(parameters_of(self.trace, path))

    def candidate(self, path: str) -> _Candidate:
        """Judge the calls of one module."""
        if path not in self.judged:
            self.judged[path] = self._candidate(path)
        return self.judged[path]

    def _candidate(self, path: str) -> _Candidate:
        call = self.calls[path][0]
        main = main_output(call)
        if len(self.calls[path]) > 1:
            return _Candidate(call, main, None, _SEVERAL)
        if main is None:
            return _Candidate(call, None, None, "it returns no tensor")
        identity = self.stretches.identity(main, call.start, call.end)
        if identity is None:
            return _Candidate(call, main, None, self._why_not(call, main))
        for node in self.trace.nodes[call.start : call.end]:
            for value in node.outputs:
                leaks = self.last_use.get(id(value), -1) >= call.end or id(value) in self.outputs
                if leaks and value is not main:
                    return _Candidate(call, main, None, f"what {node.name} computes inside is used outside")
        return _Candidate(call, main, identity, None)

    def _why_not(self, call: ModuleCall, main: Value) -> str:
        shapes = {value.shape for value in [*call.inputs, *call.keywords.values()] if value is not None}
        if shapes and main.shape not in shapes:
            return _OTHER_SHAPE
        producer = main.producer
        while producer is not None and producer.name in (
            "view",
            "reshape",
            "permute",
            "transpose",
            "contiguous",
        ):
            producer = next(producer.inputs()).producer
        if producer is None:
            return _NO_SUM
        source = next(producer.inputs(), None)
        after_sum = (
            source is not None and source.producer is not None and source.producer.name.startswith("add")
        )
        if producer.name.endswith("norm") and after_sum:
            return _NORM
        return _ACTIVATION if after_sum and not producer.name.startswith("add") else _NO_SUM

    def neighbours(self, path: str) -> tuple[ModuleCall | None, ModuleCall | None]:
        """Calls of the entries of the same list that ran just before and just after."""
        parent = path.rpartition(".")[0]
        own = self.calls[path][0]
        beside = [
            calls[0]
            for other, calls in self.calls.items()
            if other.rpartition(".")[0] == parent and other.rpartition(".")[2].isdigit() and other != path
        ]
        before = [call for call in beside if call.end <= own.start]
        after = [call for call in beside if call.start >= own.end]
        return (
            max(before, key=lambda call: call.start, default=None),
            min(after, key=lambda call: call.start, default=None),
        )

    def is_chained(self, candidate: _Candidate) -> bool:
        """Whether the entry before hands its result to this one, and this one to the entry after."""
        call, main, identity = candidate.call, candidate.main, candidate.identity
        if identity is None or main is None or not call.path.rpartition(".")[2].isdigit():
            return False
        before, after = self.neighbours(call.path)
        if before is None and after is None:
            return False
        if before is not None and main_output(before) is not identity.root:
            return False
        if after is None:
            return True
        given = [*after.inputs, *after.keywords.values()]
        elsewhere = id(main) in self.outputs or self.last_use.get(id(main), -1) >= after.end
        return not elsewhere and any(value is main for value in given)


def main_output(call: ModuleCall) -> Value | None:
    """The first floating point tensor that a call returned."""
    return next((value for value in values_of_output(call.output) if value.is_floating), None)


def parameters_of(trace: Trace, path: str) -> list[str]:
    """Names of the parameters under a module path."""
    return [
        name
        for name, value in trace.parameters.items()
        if value.kind == "parameter" and name.startswith(path + ".")
    ]


def _judged(views: list[_View], path: str) -> _Candidate:
    """Judge a module by every recording; the first one's view is returned, with a reason from any."""
    own = views[0].candidate(path)
    for view in views[1:]:
        if own.reason is None and path in view.calls:
            other = view.candidate(path)
            if other.reason is not None:
                return _Candidate(own.call, own.main, None, f"{other.reason} (in training mode)")
    return own


def _taken(view: _View, good: set[str]) -> set[str]:
    """Of candidates inside candidates (a stage, its blocks, their halves), choose those with the most siblings."""
    groups: dict[Any, list[str]] = {}
    for path in view.calls:
        if path in good:
            groups.setdefault(view.group(path), []).append(path)
    inner: dict[str, list[str]] = {path: [] for path in good}
    for path in good:
        above = path.rpartition(".")[0]
        while above:
            if above in good:
                inner[above].append(path)
            above = above.rpartition(".")[0]

    def siblings(path: str, outer: str) -> int:
        """Number of siblings of a candidate inside ``outer``; beside no list they count when they are all of it."""
        members = view.members[view.group(path)]
        covers = view.group(path)[1] or _sums(view, members) == _sums(view, [outer])
        return len(members) if covers else 1

    def descends(group: Any, paths: list[str]) -> bool:
        own = len(view.members[group])
        deepest = max((siblings(path, outer) for outer in paths for path in inner[outer]), default=0)
        if own == deepest == 1:  # a container or wrapper around what does the adding
            return all(_sums(view, inner[path]) == _sums(view, [path]) for path in paths)
        return deepest > own

    passed = {path for group, paths in groups.items() if descends(group, paths) for path in paths}
    taken = good - passed
    return {path for path in taken if not any(path in inner[outer] for outer in taken)}


def _sums(view: _View, paths: Iterable[str]) -> set[int]:
    """Numbers of the operators by which modules add their branches."""
    identities = [view.candidate(path).identity for path in paths]
    return {number for identity in identities if identity is not None for number in identity.sums}


def _look_alikes(view: _View, found: Mapping[str, _Candidate], good: set[str]) -> set[str]:
    """Repeated modules of a list that add something of their input's shape, outside and around no candidate."""
    alike: set[str] = set()
    for path, candidate in found.items():
        parent, _, key = path.rpartition(".")
        if candidate.reason is None or not key.isdigit() or len(view.members[view.group(path)]) < 2:
            continue
        if any(other.startswith(path + ".") or path.startswith(other + ".") for other in good):
            continue
        main, call = candidate.main, candidate.call
        adds = any(
            node.name.startswith("add") and main is not None and node.output.shape == main.shape
            for node in view.trace.nodes[call.start : call.end]
            if node.outputs
        )
        if adds and not any(parent == other or parent.startswith(other + ".") for other in alike):
            alike.add(path)
    return alike


def _block(
    views: list[_View], path: str, stage: tuple[str, ...], found: Mapping[str, _Candidate], may_go: bool
) -> Block:
    view = views[0]
    candidate = found.get(path)
    block = Block(path, stage, parameters_of(view.trace, path))
    if candidate is None or candidate.identity is None or not may_go:
        block.reason = candidate.reason if candidate is not None else _NO_SUM
        main = candidate.main if candidate is not None else None
        block.where = main.producer.where if main is not None and main.producer is not None else ""
        return block
    judged = [own.candidate(path) for own in views if path in own.calls]
    identities = [own.identity for own in judged if own.identity is not None]
    block.zeroed = sorted(frozenset().union(*(identity.zeroed for identity in identities)))
    block.source = source_of(candidate.call, candidate.identity.root)
    block.structure = structure_of(candidate.call, candidate.main)
    block.chained = all(
        own.is_chained(judgement)
        for own, judgement in zip([v for v in views if path in v.calls], judged, strict=True)
    )
    if not block.chained and (block.source is None or block.structure is None):
        block.reason = "it neither stands in a plain chain nor returns what a stand-in could return"
    return block


def source_of(call: ModuleCall, root: Value) -> int | str | None:
    """Return which argument of a call is ``root``."""
    for position, value in enumerate(call.inputs):
        if value is root:
            return position
    return next((key for key, value in call.keywords.items() if value is root), None)


def structure_of(call: ModuleCall, main: Value | None) -> Any:
    """Return how a call's output can be imitated: see :attr:`Block.structure`."""

    def one(item: Any) -> Any:
        if item is None:
            return None
        if item is main:
            return "main"
        argument = source_of(call, item) if isinstance(item, Value) else None
        return {"input": argument} if argument is not None else ...

    output = call.output
    if output is main:
        return "main"
    if type(output) is not tuple:
        return None
    items = [one(item) for item in output]
    return items if ... not in items else None
