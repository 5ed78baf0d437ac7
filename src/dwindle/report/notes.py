"""What an honest reader should know beside the good news: where a step brought nothing, and what figures mean."""

from __future__ import annotations

from collections.abc import Iterator

from dwindle.report.summary import Row, RunSummary
from dwindle.report.wording import milliseconds_text, percent_text, points_text

__all__ = ["notes_of"]

_NOTHING = 1.02
"""Below this speed-up a step is said to have brought nothing."""


def notes_of(summary: RunSummary) -> list[str]:
    """Return the notes of a run, most important first."""
    return [*_score(summary), *_speed(summary), *_parity(summary), *_proofs(summary), *_meaning(summary)]


def _score(summary: RunSummary) -> Iterator[str]:
    before, after = (row.score(summary.metric) for row in (summary.original, summary.final))
    if before is None or after is None:
        return
    if summary.metric == "agreement":
        yield (
            "There are no labels here. Agreement says how often a model answers as the original does; it does not say "
            "that either is right."
        )
        return
    change = after.mean - before.mean
    if change < 0:
        yield f"The final model gives up {points_text(change).lstrip('−')} of accuracy."
    worst = min(b - a for a, b in zip(before.values, after.values, strict=True))
    if len(before.values) > 1 and worst < change - 1e-12 and worst < 0:
        yield f"In the worst of {len(before.values)} seeds it gives up {points_text(worst).lstrip('−')}."
    if abs(change) < 2 / summary.samples:
        worth = f"{100 / summary.samples:.2f} points ({summary.samples:,} answers)"
        yield f"One test answer is worth {worth}, so a difference of this size is within chance."


def _speed(summary: RunSummary) -> Iterator[str]:
    for name in runtime_names(summary):
        first = summary.original.runtimes.get(name)
        for before, after in zip(summary.rows, summary.rows[1:], strict=False):
            yield from _step(name, _latest_with_time(summary, before, name), after)
        last = summary.final.runtimes.get(name)
        if last is not None and last.failure is not None:
            yield f"The final model does not run in {name}: {last.failure}"
        if first is None or last is None or first.p50 is None or last.p50 is None or last.simulated:
            continue
        if first.p50.mean < last.p50.mean * _NOTHING:
            yield (
                f"All of it brought no speed in {name}: {milliseconds_text(first.p50.mean)} before, "
                f"{milliseconds_text(last.p50.mean)} after."
            )


def _latest_with_time(summary: RunSummary, row: Row, name: str) -> Row | None:
    """``row``, or the nearest model before it that was timed in this runtime."""
    for candidate in reversed(summary.rows[: summary.rows.index(row) + 1]):
        figures = candidate.runtimes.get(name)
        if figures is not None and figures.p50 is not None and not figures.simulated:
            return candidate
    return None


def _step(name: str, before: Row | None, after: Row) -> Iterator[str]:
    figures = after.runtimes.get(name)
    if before is None or figures is None or figures.p50 is None or figures.simulated:
        return
    first = before.runtimes[name].p50
    if first is not None and first.mean < figures.p50.mean * _NOTHING:
        yield (
            f"In {name}, “{after.title}” is no faster than “{before.title}”: {milliseconds_text(first.mean)} before, "
            f"{milliseconds_text(figures.p50.mean)} after."
        )


def _parity(summary: RunSummary) -> Iterator[str]:
    for name, figures in summary.final.runtimes.items():
        if figures.parity is not None and figures.different is not None and figures.parity.mean < 1.0:
            most = max(figures.different.values)
            yield (
                f"In {name}, {percent_text(figures.parity.mean)} of the final model's answers equal torch's; "
                f"at most {most:.0f} of {summary.samples:,} differ."
            )


def _proofs(summary: RunSummary) -> Iterator[str]:
    for run in summary.seeds[:1]:
        for record in run.stages:
            proof = record["result"].get("proof")
            if record["kind"] != "prune":
                continue
            if proof is None:
                yield f"The cut of “{record['label']}” was not proven: verification was switched off."
            elif proof.get("inside"):
                yield (
                    f"“{record['label']}” was compared with the masked model with its mask applied inside "
                    f"{len(proof['inside'])} operators, where plain equality cannot hold by mathematics."
                )
            if record["result"].get("rewritten"):
                yield f"“{record['label']}” could not be cut in place; the model is a rewritten graph now."


def _meaning(summary: RunSummary) -> Iterator[str]:
    if any(figures.simulated for row in summary.rows for figures in row.runtimes.values()):
        yield "Torch only simulates int8, so its time for that model is left out."
    if summary.batch_size is not None:
        threads = "their own choice of threads" if summary.threads is None else f"{summary.threads} thread(s)"
        yield (
            f"Times are of batches of {summary.batch_size}, with {threads}, on the machine described below; models and "
            "runtimes were called in turn. Other processors give other ratios."
        )


def runtime_names(summary: RunSummary) -> list[str]:
    """All runtimes that any model was measured in, in order."""
    return list(dict.fromkeys(name for row in summary.rows for name in row.runtimes))
