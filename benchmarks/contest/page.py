"""Writes ``docs/pruners.md``, its tables and its pictures from the rows of ``benchmarks/pruners.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from contest.verdict import Row, by_method, mean_and_error, plus_minus, reached, title_of, verdict

_INTRODUCTION = """# Which pruner?

*Made by `benchmarks/pruners.py --page` from {count} runs ({source}). Do not edit by hand.*

All pruners begin with the same trained model of a task and seed and have the same epochs, learning rate and order of
batches for fine-tuning (or for pruning while training). **Structured** pruners take away the given share of the MACs,
whatever they do it with; the small model is real and proven. **Unstructured** ones set the given share of the weights
to zero, which makes the file smaller and, as it is, nothing faster. Accuracies are means over {seeds} seeds on data
that no method has seen, with the standard error of the mean; *before* is the accuracy before fine-tuning.

A run that did not reach its ratio counts in no verdict; tables show it in brackets, with how far it came.
"""


def write(rows: Sequence[Row], docs: Path) -> None:
    """Write the page and its pictures.

    Args:
        rows: One a run, failures included.
        docs: Folder of ``pruners.md``.
    """
    good = [row for row in rows if "failure" not in row]
    if not good:
        raise SystemExit("there are no results yet")
    tasks = list(dict.fromkeys(row["task"] for row in good))
    seeds = len({row["seed"] for row in good})
    parts = [
        _INTRODUCTION.format(count=len(good), source=_source(good), seeds=seeds),
        "## Verdict",
        *verdict(good),
    ]
    for kind in ("structured", "unstructured"):
        for task in tasks:
            own = [row for row in good if (row["kind"], row["task"]) == (kind, task)]
            if own:
                name = f"pruners-{kind}-{task}.png"
                picture(own, docs / name, kind)
                whole = statistics.mean(row["accuracy_whole"] for row in own)
                parts += [
                    f"## {kind.capitalize()}: {task} (whole model {whole:.2%})",
                    f"![{kind}, {task}]({name})",
                ]
                parts.append(table(own, kind))
    failed = [row for row in rows if "failure" in row]
    if failed:
        parts += [
            "## What failed",
            *(f"- {title_of(row)}, {row['task']}: {row['failure']}" for row in _first(failed)),
        ]
    (docs / "pruners.md").write_text("\n\n".join(parts) + "\n")


def _first(rows: Sequence[Row]) -> list[Row]:
    return list({(row["tool"], row["method"], row["task"]): row for row in rows}.values())


def _source(rows: Sequence[Row]) -> str:
    commits = sorted({row["commit"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    torch = ", ".join(sorted({row["torch"] for row in rows}))
    return f"dwindle at {', '.join(commits)}; {dates[0]} to {dates[-1]}; torch {torch}"


def table(rows: Sequence[Row], kind: str) -> str:
    """One line a method: accuracy at each ratio, then what the model is like at the middle one."""
    ratios = sorted({row["ratio"] for row in rows})
    titles = list(dict.fromkeys(title_of(row) for row in rows))
    order = sorted(titles, key=lambda title: -_mean_of(rows, title, ratios))
    heads = ["method", *(f"{ratio:.0%}" for ratio in ratios), *(f"before, {ratio:.0%}" for ratio in ratios)]
    heads += ["MACs" if kind == "structured" else "zeros", "parameters", "latency", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    middle = ratios[len(ratios) // 2]
    for title in order:
        cells = [f"**{title}**" if title.startswith("dwindle") else title]
        cells += [_cell(rows, title, ratio, "accuracy") for ratio in ratios]
        cells += [_cell(rows, title, ratio, "accuracy_before_tuning") for ratio in ratios]
        found = by_method(rows, middle).get(title) or [row for row in rows if title_of(row) == title]
        share = "macs" if kind == "structured" else "sparsity"
        cells.append(f"{_average(found, share):.1%}")
        cells.append(f"{_average(found, 'parameters'):.0%}")
        cells.append(
            f"{statistics.mean(row['milliseconds'] / row['milliseconds_whole'] for row in found):.0%}"
        )
        cells.append(f"{_average(found, 'seconds'):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"\n\nThe last four columns: at {middle:.0%}, against the whole model; latency of torch, one sample."
    )
    return "\n".join(lines) + note


def _average(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _mean_of(rows: Sequence[Row], title: str, ratios: Sequence[float]) -> float:
    found = [by_method(rows, ratio).get(title) for ratio in ratios]
    return statistics.mean(_average(own, "accuracy") if own else 0.0 for own in found)


def _cell(rows: Sequence[Row], title: str, ratio: float, key: str) -> str:
    values = [row[key] for row in by_method(rows, ratio).get(title, []) if row[key] is not None]
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    if key != "accuracy":
        return f"{mean:.1%}"
    found = by_method(rows, ratio)[title]
    if all(map(reached, found)):
        return f"{mean:.2%}{plus_minus(error)}"
    gone = statistics.mean(
        1 - row["macs"] if row["kind"] == "structured" else row["sparsity"] for row in found
    )
    return f"({mean:.2%} at {gone:.0%})"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both: least cost (first) and highest value (second), by cost."""
    best, front = -math.inf, []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if value > best:
            best = value
            front.append((cost, value))
    return front


def _left(rows: Sequence[Row], kind: str) -> float:
    return _average(rows, "macs") if kind == "structured" else 1 - _average(rows, "sparsity")


def picture(rows: Sequence[Row], path: Path, kind: str) -> None:
    """Draw accuracy over MACs (or over the share of weights that are left), one dot a method and ratio.

    Args:
        rows: Of one kind and task.
        path: The PNG file.
        kind: ``structured`` or ``unstructured``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"dwindle": ("tab:blue", "o"), "torch-pruning": ("tab:orange", "s"), "nncf": ("tab:green", "^")}
    for tool, (color, marker) in styles.items():
        points = []
        for ratio in sorted({row["ratio"] for row in rows}):
            for title, found in by_method(rows, ratio).items():
                if title.startswith(tool + ":"):
                    points.append((_left(found, kind), _average(found, "accuracy")))
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), s=14, alpha=0.45, color=color, marker=marker)
        front = pareto(points)
        axes.plot(*zip(*front, strict=True), color=color, marker=marker, label=f"{tool}: front")
    whole = statistics.mean(row["accuracy_whole"] for row in rows)
    axes.axhline(whole, color="0.5", linestyle=":", label="whole model")
    axes.set_ylim(max(min(row["accuracy"] for row in rows) - 0.01, whole - 0.25), None)
    axes.set_xlabel("share of the MACs" if kind == "structured" else "share of the weights")
    axes.set_ylabel("accuracy on test data")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
