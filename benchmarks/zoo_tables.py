"""Writes the results of the sweep as ``docs/zoo.md`` and as an HTML table that sorts and filters."""

from __future__ import annotations

import html
import importlib.metadata
import platform
import statistics
from pathlib import Path
from typing import Any

LIBRARIES = {
    "torchvision": "torchvision: every classification, segmentation, detection, video and optical-flow model",
    "timm": "timm: the smallest member of every model family",
    "hf": "Hugging Face transformers: small configs, two layers",
    "own": "Hand-written awkward cases",
}
COLUMNS = (
    "model", "parameters", "captured", "prunable", "left", "result", "proof", "mask inside", "independent", "trains",
    "ONNX", "seconds", "remarks",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnxruntime")

Row = dict[str, Any]


def write(rows: list[Row], docs: Path, results: Path) -> None:
    """Write both tables.

    Args:
        rows: One a model, as the sweep made them.
        docs: Folder of ``zoo.md``.
        results: Folder of ``zoo.html``.
    """
    (docs / "zoo.md").write_text(markdown(rows))
    (results / "zoo.html").write_text(page(rows))


def versions(rows: list[Row]) -> str:
    """Date of the sweep and versions of what it ran on."""
    dates = sorted({row["date"] for row in rows if "date" in row})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "unknown date"
    commits = sorted({row["commit"] for row in rows if row.get("commit")})
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{when}; dwindle at {', '.join(commits) or 'unknown'}; Python {platform.python_version()}, {packages}."


def summary(rows: list[Row]) -> list[tuple[str, str]]:
    """The figures that the promise is judged by."""
    captured = [row for row in rows if row.get("captured")]
    passed = [row for row in captured if row["passes"]]
    cut = [row for row in passed if row["in_place"] is not None]
    shares = [row["prunable_share"] for row in captured]
    proofs = [row["proof_difference"] for row in cut if row["proof_dtype"] == "float64"]
    single = [row["proof_difference"] for row in cut if row["proof_dtype"] == "float32"]
    independent = [row["independent_difference"] for row in cut if row["independent_difference"] is not None]
    onnx = [row for row in rows if row.get("onnx_difference") is not None]
    refused = [row for row in rows if "onnx" in row.get("failures", {})]
    lost = [row for row in refused if row.get("onnx_before")]
    return [
        ("models", str(len(rows))),
        ("captured", str(len(captured))),
        (
            "pruned at 0.5, proven by both proofs, trained a step",
            f"{len(passed)} ({_share(passed, captured)})",
        ),
        ("of these, nothing could be cut (said in a note)", str(len(passed) - len(cut))),
        ("realized in place", f"{sum(row['in_place'] for row in cut)} of {len(cut)}"),
        ("share of parameters on prunable axes", f"median {_middle(shares, '.3f')}, lowest {_least(shares)}"),
        ("parameters left", f"median {_middle([row['left'] for row in cut], '.3f')}"),
        (
            "largest difference of dwindle's proof, float64",
            f"{max(proofs, default=0):.1e} ({len(proofs)} models)",
        ),
        (
            "the same where a model is too large for float64",
            f"{max(single, default=0):.1e} ({len(single)} models)",
        ),
        (
            "largest difference from an eager masked copy, exact axes",
            f"{max(independent, default=0):.1e} ({len(independent)} models)",
        ),
        (
            "ONNX Runtime equal to torch within 1e-4",
            f"{len(onnx)}; refused: {len(refused)}, of these exported before pruning: {len(lost)}",
        ),
        ("seconds a model (all checks)", f"median {_middle([row['seconds']['all'] for row in rows], '.1f')}"),
    ]


def _share(some: list[Row], every: list[Row]) -> str:
    return f"{len(some) / max(len(every), 1):.1%} of those captured"


def _middle(numbers: list[float], form: str) -> str:
    return format(statistics.median(numbers), form) if numbers else "-"


def _least(numbers: list[float]) -> str:
    return f"{min(numbers):.3f}" if numbers else "-"


def cells(row: Row) -> list[str]:
    """One cell a column."""
    name = row["model"].partition("/")[2]
    if "left" not in row:
        return [name, *["-"] * 10, f"{row['seconds']['all']:.1f}", remarks(row)]
    return [
        name,
        _count(row["parameters"]),
        (row["captured"] or "no") + ("" if row["training_captured"] else ", evaluation only"),
        f"{row['prunable_share']:.3f}",
        f"{row['left']:.3f}",
        {True: "in place", False: "rewritten", None: "nothing cut"}[row["in_place"]],
        _difference(row["proof_difference"]) + (" (float32)" if row["proof_dtype"] == "float32" else ""),
        str(row["mask_inside"] or ""),
        _difference(row["independent_difference"]),
        {True: "yes", False: "no", None: "-"}[row["trains"]],
        _onnx(row),
        f"{row['seconds']['all']:.1f}",
        remarks(row),
    ]


def _onnx(row: Row) -> str:
    if "onnx" not in row["failures"]:
        return _difference(row["onnx_difference"])
    return {True: "refused", False: "refused, before pruning too", None: "refused"}[row.get("onnx_before")]


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def _difference(number: float | None) -> str:
    return "-" if number is None else "0" if number == 0 else f"{number:.0e}"


def remarks(row: Row) -> str:
    """Why little is prunable, what failed, and what the catalogue says."""
    said = [row["note"]] if row.get("note") else []
    if row.get("prunable_share", 1) < 0.95:
        reasons = [
            f"{reason} ({share:.0%})" for reason, share in row.get("reasons", {}).items() if share > 0.005
        ]
        said += ["kept: " + "; ".join(reasons)] if reasons else []
    if row.get("unknown"):
        said.append("operators without a rule: " + ", ".join(row["unknown"]))
    said += [f"**{step}**: {_short(why)}" for step, why in row.get("failures", {}).items()]
    return "; ".join(said).replace("|", "\\|").replace("\n", " ")


def _short(text: str, length: int = 160) -> str:
    text = " ".join(text.replace("\x1b[96m", "").replace("\x1b[0m", "").split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def markdown(rows: list[Row]) -> str:
    """The page of the docs."""
    lines = [
        "# The zoo: any architecture, pruned and proven",
        "",
        "Made by `python benchmarks/zoo.py` and `python benchmarks/zoo.py --tables`; do not edit by hand.",
        "",
        versions(rows),
        "",
        "Each model, with random weights, in a process of its own: pruned with `dw.prune(model, inputs,",
        "ratio=0.5)`, no code for any of them. *prunable*: share of the parameters that lie on an axis that may",
        "shrink; *left*: share of the parameters left; *proof*: largest relative difference between the small",
        "model and the masked one, as dwindle proves it (two batch sizes; *mask inside*: number of operators,",
        "such as norms over a cut axis, inside which the mask is applied in the reference); *independent*: the",
        "same against an eager copy with zeroed parameters, without any graph, where only exact axes are cut;",
        "*trains*: a step in training mode with all its branches, then a forward in evaluation mode; *ONNX*:",
        "largest relative difference between ONNX Runtime and torch, or whether the exporter or the runtime refuses",
        "the model (the reason stands in the remarks). Image sizes are small; widths and depths are those of the",
        "libraries.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {figure} |" for label, figure in summary(rows)),
    ]
    for library, title in LIBRARIES.items():
        own = [row for row in rows if row["model"].startswith(library + "/")]
        if own:
            lines += ["", f"## {title} ({len(own)})", "", "| " + " | ".join(COLUMNS) + " |"]
            lines += ["|---|" + "---:|" * 4 + "---|" + "---:|" * 3 + "---|" + "---:|" * 2 + "---|"]
            lines += [
                "| " + " | ".join(cells(row)) + " |" for row in sorted(own, key=lambda row: row["model"])
            ]
    return "\n".join(lines) + "\n"


def page(rows: list[Row]) -> str:
    """One HTML page without dependencies: click a column to sort, type to filter."""
    body = "".join(
        "<tr class='{}'>{}</tr>".format(
            "ok" if row["passes"] else "bad",
            "".join(
                f"<td>{html.escape(cell)}</td>" for cell in [row["model"].partition("/")[0], *cells(row)]
            ),
        )
        for row in rows
    )
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ["library", *COLUMNS])
    figures = "".join(
        f"<li>{html.escape(label)}: <b>{html.escape(figure)}</b></li>" for label, figure in summary(rows)
    )
    return _PAGE.format(versions=html.escape(versions(rows)), figures=figures, head=head, body=body)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>dwindle: the zoo</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: left; }}
th {{ cursor: pointer; position: sticky; top: 0; background: #fff; }} tr.bad {{ background: #fdd; }}
input {{ font: inherit; padding: .3em; width: 30em; }}
</style>
<h1>Any architecture, pruned and proven</h1><p>{versions}</p><ul>{figures}</ul>
<p><input id="filter" placeholder="filter, for example: hf llama"></p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<script>
const body = document.querySelector("tbody"), rows = [...body.rows];
document.getElementById("filter").oninput = event => {{
  const words = event.target.value.toLowerCase().split(/\\s+/);
  rows.forEach(row => row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word)));
}};
document.querySelectorAll("th").forEach((head, column) => {{
  let direction = 1;
  head.onclick = () => {{
    const value = row => {{ const text = row.cells[column].textContent, number = parseFloat(text);
      return isNaN(number) ? text : number; }};
    rows.sort((a, b) => (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * direction);
    direction = -direction;
    body.append(...rows);
  }};
}});
</script></html>
"""
