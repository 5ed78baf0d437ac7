"""Who is ahead: the best of each tool, chosen in two ways, and the same method in both tools."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
PEERS = {"structured": "torch-pruning", "unstructured": "nncf"}

#: Methods of dwindle and of NNCF that are the same algorithm.
SAME = {
    "MagnitudePruner, global": "magnitude, global",
    "LevelPruner": "magnitude, local",
    "MagnitudePruner, global, gradual": "magnitude, global, scheduled",
    "LevelPruner, gradual": "magnitude, local, scheduled",
    "RBPruner": "RB",
}
TOLERANCE = 0.02


def title_of(row: Row) -> str:
    """Tool and method."""
    return f"{row['tool']}: {row['method']}"


def reached(row: Row) -> bool:
    """Whether a run came as far as it was to come; accuracy at another ratio says nothing about this one."""
    gone = 1 - row["macs"] if row["kind"] == "structured" else row["sparsity"]
    return bool(gone >= row["ratio"] - TOLERANCE)


def by_method(rows: Iterable[Row], ratio: float) -> dict[str, list[Row]]:
    """Return the rows of each method at one ratio."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["ratio"] == ratio:
            found.setdefault(title_of(row), []).append(row)
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (NaN for a single value)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def plus_minus(error: float) -> str:
    """A standard error of a share, in points."""
    return "" if math.isnan(error) else f" ± {error * 100:.2f}"


def _points(share: float) -> str:
    """A difference of two shares in points; one that rounds to zero has no minus."""
    return f"{round(share * 100, 2) + 0.0:+.2f}"


def figure_of(rows: Iterable[Row]) -> str:
    """Mean accuracy and its standard error."""
    mean, error = mean_and_error([row["accuracy"] for row in rows])
    return f"{mean:.2%}{plus_minus(error)}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return the paragraphs of the page's verdict.

    Args:
        rows: All runs that did not fail.
    """
    good = [row for row in rows if reached(row)]
    return [
        "The best method of each tool **by its mean over all seeds**:",
        *_best_table(good, _best_on_the_mean),
        "The same, **the method being chosen for each seed by the mean over the other seeds**, so that nobody gains by "
        "having more methods to pick from afterwards (of many equally good methods, chance then decides which is "
        "judged):",
        *_best_table(good, chosen),
        *_same_table(good),
    ]


def _complete(rows: Sequence[Row], ratio: float, tool: str) -> dict[str, dict[int, Row]]:
    """Rows by method and seed, without the methods that lack a seed which others have."""
    methods = {
        title: {row["seed"]: row for row in found}
        for title, found in by_method(rows, ratio).items()
        if title.startswith(tool + ":")
    }
    most = max((len(own) for own in methods.values()), default=0)
    return {title: own for title, own in methods.items() if len(own) == most}


def _best_on_the_mean(rows: Sequence[Row], ratio: float, tool: str) -> dict[int, Row]:
    """Return for each seed the row of the method whose mean over all seeds is the highest."""
    methods = _complete(rows, ratio, tool).values()
    return max(methods, key=lambda own: statistics.mean(row["accuracy"] for row in own.values()), default={})


def chosen(rows: Sequence[Row], ratio: float, tool: str) -> dict[int, Row]:
    """Return for each seed the row of the method that is best on the other seeds.

    Args:
        rows: Of one kind and task.
        ratio: The ratio.
        tool: The tool.
    """
    methods = _complete(rows, ratio, tool)
    picked = {}
    for seed in sorted({seed for own in methods.values() for seed in own}):
        known = {title: own for title, own in methods.items() if seed in own}
        scores = {
            title: statistics.mean(
                row["accuracy"] for other, row in own.items() if other != seed or len(own) == 1
            )
            for title, own in known.items()
        }
        picked[seed] = known[max(scores, key=lambda title: scores[title])][seed]
    return picked


def _cases(rows: Sequence[Row]) -> Iterator[tuple[str, str, float, list[Row]]]:
    """Yield kind, task, ratio and the rows of that kind and task."""
    for kind in PEERS:
        for task in dict.fromkeys(row["task"] for row in rows):
            own = [row for row in rows if (row["kind"], row["task"]) == (kind, task)]
            for ratio in sorted({row["ratio"] for row in own}):
                yield kind, task, ratio, own


def _best_table(rows: Sequence[Row], choose: Any) -> list[str]:
    lines = [
        "| kind | task | ratio | best of dwindle | accuracy | best of the peer | accuracy | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    differences: dict[str, list[float]] = {}
    for kind, task, ratio, own in _cases(rows):
        ours, theirs = (choose(own, ratio, tool) for tool in ("dwindle", PEERS[kind]))
        pairs = [ours[seed]["accuracy"] - theirs[seed]["accuracy"] for seed in ours if seed in theirs]
        if not pairs:
            continue
        difference, error = mean_and_error(pairs)
        differences.setdefault(kind, []).append(difference)
        lines.append(
            f"| {kind} | {task} | {ratio:.0%} | {_names(ours)} | {figure_of(ours.values())} | {_names(theirs)} | "
            f"{figure_of(theirs.values())} | {_points(difference)}{plus_minus(error)} |"
        )
    means = [
        f"On average over tasks and ratios the best {kind} pruner of dwindle is "
        f"{_points(statistics.mean(own))} points from the best of {PEERS[kind]}."
        for kind, own in differences.items()
    ]
    return ["\n".join(lines), *means]


def _names(picked: Mapping[int, Row]) -> str:
    return "; ".join(dict.fromkeys(row["method"] for row in picked.values()))


def _same_table(rows: Sequence[Row]) -> list[str]:
    """Compare the methods that both tools have."""
    lines = [
        "| task | ratio | dwindle | accuracy | NNCF | accuracy | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, task, ratio, own in _cases(rows):
        methods = by_method(own, ratio)
        for mine, theirs in SAME.items() if kind == "unstructured" else ():
            ours, others = (
                {row["seed"]: row for row in methods.get(title, [])}
                for title in (f"dwindle: {mine}", f"nncf: {theirs}")
            )
            if not ours:
                continue
            if not others:
                cells = ["did not reach the ratio", ""]
            else:
                pairs = [ours[seed]["accuracy"] - others[seed]["accuracy"] for seed in ours if seed in others]
                difference, error = mean_and_error(pairs) if pairs else (math.nan, math.nan)
                cells = [figure_of(others.values()), f"{_points(difference)}{plus_minus(error)}"]
            lines.append(
                f"| {task} | {ratio:.0%} | {mine} | {figure_of(ours.values())} | {theirs} | {' | '.join(cells)} |"
            )
    return ["The same method in both, at equal sparsity:", "\n".join(lines)] if len(lines) > 2 else []
