"""The pictures of a study: its trials, score against cost, what mattered, and the best of them in a table.

Everything is drawn from JSON data (``StudyResult.to_json()``), so a page can be made on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dwindle.report.plot import Plot
from dwindle.report.search_page import Scale, number_text, write_body

__all__ = ["front_plot", "history_plot", "write_study_page"]


def write_study_page(
    record: Mapping[str, Any], path: str | os.PathLike[str], title: str | None = None, *, shown: int = 12
) -> None:
    """Write one self-contained HTML page about a study, atomically.

    Args:
        record: What ``StudyResult.to_json()`` gave.
        path: The HTML file.
        title: Heading; the study's name when left out.
        shown: So many of the best trials stand in the table.
    """
    names = list(record["objectives"])
    body = (
        f"<section><h2>Trials</h2><p class='hint'>{_history_hint(record)}</p>{history_plot(record)}</section>"
    )
    for cost in _costs(record):
        picture = front_plot(record, names[0], cost)
        if picture:
            heading = f"{escape(names[0])} against {escape(cost)}"
            hint = "A line joins the trials within all limits that no other beats in both."
            body += f"<section><h2>{heading}</h2><p class='hint'>{hint}</p>{picture}</section>"
    body += _importances(record["importances"], names[0]) + _table(record, shown)
    write_body(path, title or record["name"], _sentence(record), body)


def history_plot(record: Mapping[str, Any]) -> str:
    """Return the HTML of the trials in their order: a dot each, a line for the best so far; empty without values.

    Args:
        record: What ``StudyResult.to_json()`` gave. The first objective is drawn.
    """
    name, way = next(iter(record["objectives"].items()))
    trials = [trial for trial in record["trials"] if name in trial["values"]]
    if not trials:
        return ""
    scale = Scale([trial["values"][name] for trial in trials])
    plot = Plot(f"{name} of {len(trials)} trials")
    _levels(plot, scale)
    width = record["trials"][-1]["number"] + 1
    line: list[tuple[float, float]] = []
    best: float | None = None
    for trial in trials:
        value = trial["values"][name]
        if trial["feasible"] and (best is None or (value > best if way == "maximize" else value < best)):
            best = value
        if best is not None:
            line.append((_across(trial["number"], width), scale(best)))
    plot.line(line, "mean")
    for trial in trials:
        place = (_across(trial["number"], width), scale(trial["values"][name]))
        plot.dot(place, _dot(record, trial), _words(trial))
    for number in sorted({0, width // 2, width - 1}):
        plot.word((_across(number, width), 0.0), f"{number}", "stage")
    return plot.markup()


def front_plot(record: Mapping[str, Any], score: str, cost: str) -> str:
    """Return the HTML of score (upwards) against cost (to the right); empty when fewer than two trials have both.

    Args:
        record: What ``StudyResult.to_json()`` gave.
        score: An objective.
        cost: An objective or a cost.
    """
    trials = [
        trial for trial in record["trials"] if score in trial["values"] and _cost(trial, cost) is not None
    ]
    if len(trials) < 2:
        return ""
    upwards, along = (
        Scale([t["values"][score] for t in trials]),
        Scale([_cost(t, cost) or 0.0 for t in trials]),
    )
    plot = Plot(f"{score} against {cost} of {len(trials)} trials")
    _levels(plot, upwards)
    for value in (along.low, (along.low + along.high) / 2, along.high):
        plot.word((along(value), 0.0), number_text(value), "stage")
    ways = record["objectives"]
    front = _front(trials, score, cost, ways[score] == "maximize", ways.get(cost, "minimize") == "maximize")
    plot.line([(along(_cost(t, cost) or 0.0), upwards(t["values"][score])) for t in front], "mean")
    for trial in trials:
        place = (along(_cost(trial, cost) or 0.0), upwards(trial["values"][score]))
        plot.dot(place, "large" if trial in front else "small", _words(trial))
    return plot.markup()


def _front(
    trials: Sequence[Mapping[str, Any]], score: str, cost: str, score_up: bool, cost_up: bool
) -> list[Mapping[str, Any]]:
    """The trials within all limits that no other beats in score and cost, by cost."""
    own = [trial for trial in trials if trial["feasible"]]

    def point(trial: Mapping[str, Any]) -> tuple[float, float]:
        price = float(_cost(trial, cost) or 0.0)
        return (-price if cost_up else price, -trial["values"][score] if score_up else trial["values"][score])

    found: list[Mapping[str, Any]] = []
    for trial in sorted(own, key=lambda entry: (point(entry), entry["number"])):
        if not found or point(trial)[1] < point(found[-1])[1]:
            found.append(trial)
    return found


def _costs(record: Mapping[str, Any]) -> list[str]:
    """Objectives after the first, then costs that no objective is."""
    names = list(record["objectives"])
    costs = dict.fromkeys(name for trial in record["trials"] for name in trial["costs"])
    return [*names[1:], *(name for name in costs if name not in names)]


def _cost(trial: Mapping[str, Any], name: str) -> float | None:
    found = trial["values"].get(name, trial["costs"].get(name))
    return None if found is None else float(found)


def _dot(record: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    return "large" if trial["number"] in record["front"] else "small"


def _words(trial: Mapping[str, Any]) -> str:
    """What stands beside a dot."""
    figures = {**trial["values"], **{k: v for k, v in trial["costs"].items() if k not in trial["values"]}}
    text = ", ".join(f"{name} {number_text(value)}" for name, value in figures.items())
    above = [name for name, excess in trial["violations"].items() if excess > 0]
    return f"trial {trial['number']}: {text}" + (f" (above the limit: {', '.join(above)})" if above else "")


def _levels(plot: Plot, scale: Scale) -> None:
    for value in scale.levels():
        plot.level(scale(value), number_text(value))


def _across(number: int, width: int) -> float:
    return (number + 0.5) / width


def _sentence(record: Mapping[str, Any]) -> str:
    trials, names = record["trials"], record["objectives"]
    parts = [f"{len(trials)} of {record['wanted']} trials"]
    for state in ("pruned", "failed"):
        count = sum(trial["state"] == state for trial in trials)
        if count:
            parts.append(f"{count} {state}")
    above = sum(trial["state"] == "complete" and not trial["feasible"] for trial in trials)
    if above:
        parts.append(f"{above} above a limit")
    wanted = " and ".join(f"{name} {'high' if way == 'maximize' else 'low'}" for name, way in names.items())
    return f"{', '.join(parts)}; drawn by {record['sampler']} to make {wanted}."


def _history_hint(record: Mapping[str, Any]) -> str:
    name = escape(next(iter(record["objectives"])))
    return f"{name} of each trial, in their order; the line is the best so far within all limits."


def _importances(shares: Mapping[str, float], name: str) -> str:
    """A bar a parameter."""
    if not shares:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(parameter)}</code></th><td>{share:.0%}'
        f'<div class="meter"><i style="width:{100 * share:.1f}%"></i></div></td></tr>'
        for parameter, share in sorted(shares.items(), key=lambda entry: -entry[1])
    )
    return (
        f"<section><h2>What mattered for {escape(name)}</h2>"
        "<p class='hint'>The share of its variance that each setting explains by itself.</p>"
        f'<div class="scroll"><table class="figures plain"><tbody>{rows}</tbody></table></div></section>'
    )


def _table(record: Mapping[str, Any], shown: int) -> str:
    """The best trials, with what was drawn for them."""
    by_number = {trial["number"]: trial for trial in record["trials"]}
    chosen = [by_number[number] for number in record["front"]]
    name, way = next(iter(record["objectives"].items()))
    others = [trial for trial in record["trials"] if trial["feasible"] and trial not in chosen]
    others.sort(key=lambda trial: trial["values"][name], reverse=way == "maximize")
    chosen = [*chosen, *others][:shown]
    if not chosen:
        return ""
    figures = [*record["objectives"], *(cost for cost in _costs(record) if cost not in record["objectives"])]
    head = "".join(f"<th>{escape(text)}</th>" for text in ("trial", *figures, "drawn"))
    rows = ""
    for trial in chosen:
        drawn = ", ".join(f"{key} = {_short(value)}" for key, value in trial["parameters"].items())
        cells = "".join(f"<td>{_number(_cost(trial, figure))}</td>" for figure in figures)
        rows += (
            f'<tr><th scope="row">{trial["number"]}</th>{cells}<td class="names">{escape(drawn)}</td></tr>'
        )
    return (
        f'<section><h2>The best trials</h2><div class="scroll"><table class="figures cuts"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else number_text(value)


def _short(value: Any) -> str:
    return number_text(value) if isinstance(value, float) else str(value)
