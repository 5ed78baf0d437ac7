"""Mixtures of experts in a recording: who scores the experts, which tensors hold them, how many of them run.

A router is a linear map whose result, along its last dimension, is turned into choices (``topk``) or into weights
(a softmax) over the experts. The experts are tensors with one entry an expert, or a list of equal modules, in the
nearest module around the router. No class or library is known by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dwindle.graph.nodes import Node, Value
from dwindle.graph.trace import Trace

#: Operators that keep the scores of the experts apart, along the last dimension.
_SCORES = frozenset(
    {"softmax", "_softmax", "log_softmax", "sigmoid", "to", "_to_copy", "add", "sub", "mul", "div", "neg", "exp",
     "float", "contiguous", "clone", "view", "reshape", "softplus", "dropout", "masked_fill", "where", "relu",
     "clamp", "detach", "alias", "tanh", "scatter", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view",
     "sqrt"}
)  # fmt: skip
_CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort"})
_LINEAR = frozenset({"linear", "addmm", "mm", "matmul", "einsum"})
_TURNED = frozenset({"t", "transpose", "numpy_T", "mT", "permute", "to", "_to_copy", "detach", "alias"})
_LEVELS = 4
_SOFTMAX = frozenset({"softmax", "_softmax"})

_GROUPED = "its experts are chosen by groups: each group would have to lose the same number"
_OTHER_ROUTERS = "several routers share the module around its experts"
_SCORES_LEAVE = "the scores of the experts are an output of the model"


@dataclass(eq=False, slots=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        path: Module around the router and the experts.
        size: Number of experts.
        router: Name of the parameter that scores them: one row an expert.
        rows: Dimension of it that has one entry an expert.
        chosen: How many experts run for each token (at least so many must stay); 0 when all do.
        tensors: Parameters and buffers with one entry an expert, and the dimension: the router's and the experts'.
        lists: Paths of lists with one module an expert.
        reason: Why no expert may go; None when some may.
        where: Source line of the choice.
    """

    path: str
    size: int
    router: str
    rows: int
    chosen: int
    tensors: dict[str, int] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    reason: str | None = None
    where: str = ""


def find_mixtures(traces: list[Trace]) -> list[Mixture]:
    """Return the mixtures of experts of a model, in the order in which they run.

    Args:
        traces: Recordings of the model; the first one is searched.
    """
    trace = traces[0]
    found: dict[str, Mixture] = {}
    users = _users(trace)
    outputs = {id(value) for value in trace.outputs}
    for node in trace.live_nodes():
        if node.name not in _LINEAR or not node.outputs:
            continue
        for parameter, rows in _maps(node):
            size = parameter.shape[rows]
            if size < 2 or node.output.shape[-1] != size:
                continue
            choice = _choice(node.output, size, users, outputs)
            mixture = found.get(parameter.name)
            if mixture is None and choice.node is not None:
                mixture = _mixture(trace, node.output, parameter, rows, choice)
            if mixture is not None:
                found[parameter.name] = mixture
                if choice.leaves:
                    mixture.reason = mixture.reason or _SCORES_LEAVE
    for mixture in found.values():
        if sum(other.path == mixture.path for other in found.values()) > 1:
            mixture.reason = mixture.reason or _OTHER_ROUTERS
    return list(found.values())


@dataclass(slots=True)
class _Choice:
    """Where experts are chosen, how many at most (none where all are weighed), whether by groups, and whether the
    scores or the numbers of the chosen ones are outputs of the model.
    """

    node: Node | None
    chosen: int = 0
    grouped: bool = False
    leaves: bool = False


def _users(trace: Trace) -> dict[int, list[Node]]:
    users: dict[int, list[Node]] = {}
    for node in trace.live_nodes():
        for value in node.inputs():
            users.setdefault(id(value), []).append(node)
    return users


def _maps(node: Node) -> Iterator[tuple[Value, int]]:
    """Yield the parameter with one row a result of a linear map, and the dimension of the rows."""
    places = {"linear": (1,), "addmm": (2,), "mm": (1,), "matmul": (1,)}.get(node.name)
    values = list(node.inputs()) if places is None else [node.args[place] for place in places]
    for value in values:
        if not isinstance(value, Value):
            continue
        turned = 0
        source: Value = value
        while source.producer is not None and source.producer.name in _TURNED:
            turned += source.producer.name in ("t", "transpose", "numpy_T", "mT", "permute")
            source = next(source.producer.inputs())
        if source.kind == "parameter" and len(source.shape) == 2:
            if node.name == "einsum":
                rows = [dim for dim in (0, 1) if source.shape[dim] == node.output.shape[-1]]
                if len(rows) == 1:
                    yield source, rows[0]
            else:
                yield source, (0 if node.name == "linear" else 1) ^ (turned % 2)


def _choice(scores: Value, size: int, users: dict[int, list[Node]], outputs: set[int]) -> _Choice:
    """Follow the scores of the experts to where some are chosen, or to the softmax that weighs them all."""
    waiting, seen = [(scores, False)], set()
    soft: Node | None = None
    choices: list[tuple[Node, int, bool]] = []
    leaves = False
    while waiting:
        value, grouped = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        leaves |= id(value) in outputs
        for node in users.get(id(value), []):
            name = node.name.removesuffix("_")
            if name in _CHOICES:
                whole = bool(value.shape) and value.shape[-1] == size
                if whole or grouped:
                    count = int(node.argument("k", 1)) if name == "topk" else 1
                    choices.append((node, count, not whole))
                    leaves |= any(id(own) in outputs for own in node.outputs)
            elif name in _SCORES and node.outputs:
                output = node.output
                if name in _SOFTMAX and output.shape[-1] == size and soft is None:
                    soft = node
                split = not output.shape or output.shape[-1] != size
                if not split or name in ("view", "reshape", "unflatten"):
                    waiting.append((output, split))
    if choices:
        # experts that are chosen one after another leave several choices of one
        single = sum(node.name != "topk" for node, _, _ in choices)
        most = max(single, *(count for _, count, _ in choices))
        return _Choice(choices[0][0], most, any(grouped for _, _, grouped in choices), leaves)
    return _Choice(soft, leaves=leaves)


def _mixture(trace: Trace, scores: Value, router: Value, rows: int, choice: _Choice) -> Mixture | None:
    """Look for the experts in the nearest module around a router; None when there are none."""
    size = router.shape[rows]
    holder = router.name.rpartition(".")[0]
    path = holder
    for _ in range(_LEVELS):
        tensors, lists = _experts(trace, path, size, router.name)
        if tensors or lists:
            break
        if not path:
            return None
        path = path.rpartition(".")[0]
    else:
        return None
    experts = {*tensors, *(name for own in lists for name in _under(trace, own))}
    if not _meet(trace, scores, experts):
        return None
    own = Mixture(path, size, router.name, rows, choice.chosen, {router.name: rows, **tensors}, lists)
    for name, value in trace.parameters.items():
        if name.rpartition(".")[0] == holder and name != router.name and value.shape == (size,):
            own.tensors[name] = 0
    own.where = choice.node.where if choice.node is not None else ""
    own.reason = _GROUPED if choice.grouped else None
    return own


def _under(trace: Trace, path: str) -> list[str]:
    return [name for name in trace.parameters if not path or name.startswith(path + ".")]


def _experts(trace: Trace, path: str, size: int, router: str) -> tuple[dict[str, int], list[str]]:
    """Tensors and lists under a module with one entry an expert."""
    names = [name for name in _under(trace, path) if name != router]
    stacked = [
        name
        for name in names
        if len(trace.parameters[name].shape) > 2 and trace.parameters[name].shape[0] == size
    ]
    holders = {name.rpartition(".")[0] for name in stacked}
    tensors = {
        name: 0
        for name in names
        if name in stacked
        or (
            name.rpartition(".")[0] in holders
            and len(trace.parameters[name].shape) == 2
            and trace.parameters[name].shape[0] == size
        )
    }
    return tensors, _lists(names, path, size)


def _lists(names: list[str], path: str, size: int) -> list[str]:
    """Paths of lists with exactly ``size`` entries that hold the same parameters; the outermost ones."""
    entries: dict[tuple[str, str], dict[int, set[str]]] = {}
    for name in names:
        parts = name.split(".")
        for place in range(path.count(".") + 1 if path else 0, len(parts) - 1):
            found = re.fullmatch(r"(.*?)(\d+)", parts[place])
            if found is not None:
                key = ".".join(parts[:place]), found[1]
                entries.setdefault(key, {}).setdefault(int(found[2]), set()).add(".".join(parts[place + 1 :]))
    lists: list[str] = []
    for (holder, _), own in entries.items():
        same = all(held == own[min(own)] for held in own.values())
        inner = any(holder == other or holder.startswith(other + ".") for other in lists)
        if sorted(own) == list(range(size)) and same and not inner:
            lists.append(holder)
    return lists


def _meet(trace: Trace, scores: Value, experts: set[str]) -> bool:
    """Whether some operator combines what comes of the scores with what comes of the experts."""
    by_scores = {id(scores)}
    by_experts = {id(trace.parameters[name]) for name in experts}
    for node in trace.live_nodes():
        scored = [id(value) in by_scores for value in node.inputs()]
        expert = [id(value) in by_experts for value in node.inputs()]
        if any(scored) and any(own and not other for own, other in zip(expert, scored, strict=True)):
            return True
        if any(scored):
            by_scores.update(map(id, node.outputs))
        if any(expert):
            by_experts.update(map(id, node.outputs))
    return False
