"""What the sections of the page show, taken from the records: times, widths, cuts, proofs, parity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.report.notes import runtime_names
from dwindle.report.summary import RunSummary
from dwindle.report.wording import milliseconds_text, percent_text

__all__ = [
    "LayerView",
    "ParityView",
    "ProofView",
    "RuntimeView",
    "TimeBar",
    "latency_views",
    "layer_views",
    "parity_views",
    "proof_views",
]


@dataclass(frozen=True)
class TimeBar:
    """One bar: a model in a runtime.

    Attributes:
        title: The model.
        text: Its time.
        note: How it compares with the original in the same runtime.
        width: p50 as a share of the longest time shown.
        reach: p90 likewise.
        role: ``before``, ``between`` or ``after``.
        best: Whether this is the shortest time of all.
    """

    title: str
    text: str
    note: str
    width: float
    reach: float
    role: str
    best: bool


@dataclass(frozen=True)
class RuntimeView:
    """The bars of one runtime."""

    name: str
    bars: list[TimeBar]


def latency_views(summary: RunSummary) -> list[RuntimeView]:
    """Bars of every runtime, all on one scale."""
    shown = [
        (name, row, figures.p50.mean, (figures.p90 or figures.p50).mean)
        for name in runtime_names(summary)
        for row in summary.rows
        if (figures := row.runtimes.get(name)) is not None
        and figures.p50 is not None
        and not figures.simulated
    ]
    if not shown:
        return []
    longest = max(p90 for _, _, _, p90 in shown)
    shortest = min(p50 for _, _, p50, _ in shown)
    views: dict[str, list[TimeBar]] = {}
    for name, row, p50, p90 in shown:
        start = summary.original.runtimes.get(name)
        note = ""
        if row is not summary.original and start is not None and start.p50 is not None:
            ratio = start.p50.mean / p50
            note = f"{ratio:.2f}× as fast" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
        role = "before" if row is summary.original else "after" if row is summary.final else "between"
        bar = TimeBar(
            row.title, milliseconds_text(p50), note, p50 / longest, p90 / longest, role, p50 == shortest
        )
        views.setdefault(name, []).append(bar)
    return [RuntimeView(name, bars) for name, bars in views.items()]


@dataclass(frozen=True)
class LayerView:
    """One layer, before and after.

    Attributes:
        name: Its module.
        kind: Its type.
        before: Width (first dimension of the weight) before.
        after: Width after.
        outer: Before, as a share of the widest layer.
        inner: After, as a share of the widest layer.
        zeros: Share of zeros among the weights after.
        shapes: Both shapes in words.
    """

    name: str
    kind: str
    before: int
    after: int
    outer: float
    inner: float
    zeros: float
    shapes: str

    @property
    def narrowed(self) -> bool:
        """Whether the layer lost width."""
        return self.after != self.before


def layer_views(summary: RunSummary) -> list[LayerView]:
    """Every layer of the original and what became of it, for the first seed."""
    models = [
        record["result"]["layers"] for record in summary.seeds[0].stages if record["result"].get("layers")
    ]
    labels = [r["label"] for r in summary.seeds[0].stages if r["result"].get("layers")]
    start = labels.index(summary.original.label) if summary.original.label in labels else 0
    if not models:
        return []
    first, last = models[start], {entry["name"]: entry for entry in models[-1]}
    widest = max((entry["shape"][0] for entry in first), default=1)
    views = []
    for entry in first:
        now = last.get(entry["name"])
        if now is None:
            continue
        before, after = entry["shape"][0], now["shape"][0]
        views.append(
            LayerView(
                entry["name"],
                entry["type"],
                before,
                after,
                before / widest,
                min(after / widest, 1.0),
                now["zeros"] / max(now["elements"], 1),
                f"{_shape(entry['shape'])} → {_shape(now['shape'])}",
            )
        )
    return views


def _shape(sizes: list[int]) -> str:
    return "×".join(map(str, sizes))


@dataclass(frozen=True)
class ProofView:
    """One cut and its proof.

    Attributes:
        label: The stage.
        proven: Whether the small model was shown equal to the masked one, in all seeds.
        difference: Largest difference over all seeds, in words.
        dtype: Precision of the comparison.
        batches: Batch sizes, in words.
        reference: What it was compared with.
        inside: Operators inside which the mask was applied.
        cuts: Axes of the first seed: kind, before, after, share that stays, parameters.
    """

    label: str
    proven: bool
    difference: str
    dtype: str
    batches: str
    reference: str
    inside: list[str]
    cuts: list[dict[str, Any]]


def proof_views(summary: RunSummary) -> list[ProofView]:
    """The proofs of all pruning stages."""
    views = []
    for position, record in enumerate(summary.seeds[0].stages):
        if record["kind"] != "prune":
            continue
        proofs = [run.stages[position]["result"].get("proof") for run in summary.seeds]
        proof: Mapping[str, Any] = proofs[0] or {}
        differences = [entry["max_difference"] for entry in proofs if entry]
        views.append(
            ProofView(
                record["label"],
                all(entry is not None and entry["proven"] for entry in proofs),
                f"{max(differences):.1e}" if differences else "not compared",
                str(proof.get("dtype", "")),
                " and ".join(map(str, proof.get("batch_sizes", []))),
                str(proof.get("reference", "")),
                list(proof.get("inside", [])),
                [_cut(cut) for cut in record["result"].get("cuts", [])],
            )
        )
    return views


def _cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": str(cut["kind"]).replace("_", " "),
        "before": cut["before"],
        "after": cut["after"],
        "share": cut["after"] / max(cut["before"], 1),
        "parameters": list(cut["parameters"]),
    }


@dataclass(frozen=True)
class ParityView:
    """How often a runtime gives the answers that torch gives.

    Attributes:
        runtime: The runtime.
        model: The model.
        share: Mean share of equal answers, 0 to 1.
        text: The same in words.
        different: Different answers for each seed, in words.
        score: Accuracy or agreement in this runtime.
        fine: Whether at least 99.5 % are equal.
    """

    runtime: str
    model: str
    share: float
    text: str
    different: str
    score: str
    fine: bool


def parity_views(summary: RunSummary) -> list[ParityView]:
    """Parity of every model in every runtime but torch itself."""
    views = []
    for row in summary.rows:
        for name, figures in row.runtimes.items():
            if figures.parity is None or name == "torch":
                continue
            different = (
                "" if figures.different is None else ", ".join(f"{v:.0f}" for v in figures.different.values)
            )
            views.append(
                ParityView(
                    name,
                    row.title,
                    figures.parity.mean,
                    percent_text(figures.parity.mean),
                    different,
                    "–" if figures.score is None else percent_text(figures.score.mean),
                    figures.parity.mean >= 0.995,
                )
            )
    return views
