"""The verdict of ``benchmarks/pruners.py``: nobody gains by having more methods to pick from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package of the benchmark, with what writes the page and what judges."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contest.page
    import contest.verdict

    yield contest
    for name in [name for name in sys.modules if name.partition(".")[0] == "contest"]:
        del sys.modules[name]


def row(tool: str, method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "digits", "kind": "structured", "tool": tool, "method": method, "ratio": 0.5, "seed": seed,
        "accuracy": accuracy, "accuracy_before_tuning": 0.5, "accuracy_whole": 0.99, "macs": 0.5, "sparsity": 0.0,
        "parameters": 0.5, "milliseconds": 1.0, "milliseconds_whole": 2.0, "seconds": 3.0, "commit": "c", "date": "d",
        "torch": "t", **more,
    }  # fmt: skip


def test_the_best_method_is_chosen_on_the_other_seeds(contest: Any) -> None:
    lucky = [
        row("dwindle", f"lucky {seed}", other, 0.9 + 0.09 * (seed == other))
        for seed in range(3)
        for other in range(3)
    ]
    steady = [row("dwindle", "steady", seed, 0.93) for seed in range(3)]
    picked = contest.verdict.chosen([*lucky, *steady], 0.5, "dwindle")
    # a lucky seed makes a method the choice for the others, where it is not lucky
    assert {seed: own["accuracy"] for seed, own in picked.items()} == pytest.approx({0: 0.9, 1: 0.9, 2: 0.9})
    only = contest.verdict.chosen(steady[:1], 0.5, "dwindle")
    assert only[0]["method"] == "steady"


def test_methods_that_lack_a_seed_are_not_chosen(contest: Any) -> None:
    rows = [row("dwindle", "whole", seed, 0.9) for seed in range(3)] + [row("dwindle", "part", 0, 0.99)]
    assert {own["method"] for own in contest.verdict.chosen(rows, 0.5, "dwindle").values()} == {"whole"}


def test_the_best_on_the_mean_is_one_method(contest: Any) -> None:
    rows = [row("dwindle", "steady", seed, 0.93) for seed in range(3)]
    rows += [row("dwindle", "lucky", seed, 0.9 + 0.06 * (seed == 0)) for seed in range(3)]
    rows += [row("torch-pruning", "peer", seed, 0.92) for seed in range(3)]
    table = contest.verdict.verdict(rows)[1]
    assert (
        "| structured | digits | 50% | steady | 93.00% ± 0.00 | peer | 92.00% ± 0.00 | +1.00 ± 0.00 |"
        in table
    )


def test_the_same_method_is_compared_and_what_did_not_reach_its_ratio_is_not(contest: Any) -> None:
    unstructured = {"kind": "unstructured", "macs": 1.0}
    rows = [row("dwindle", "RBPruner", seed, 0.93, sparsity=0.5, **unstructured) for seed in range(2)]
    rows += [row("dwindle", "LevelPruner", seed, 0.9, sparsity=0.5, **unstructured) for seed in range(2)]
    rows += [row("nncf", "magnitude, local", seed, 0.89, sparsity=0.49, **unstructured) for seed in range(2)]
    whole = [row("nncf", "RB", seed, 0.99, sparsity=0.01, **unstructured) for seed in range(2)]
    text = "\n".join(contest.verdict.verdict([*rows, *whole]))
    assert "| digits | 50% | RBPruner | 93.00% ± 0.00 | RB | did not reach the ratio |  |" in text
    assert (
        "| digits | 50% | LevelPruner | 90.00% ± 0.00 | magnitude, local | 89.00% ± 0.00 | +1.00 ± 0.00 |"
        in text
    )
    assert (
        "| unstructured | digits | 50% | RBPruner | 93.00% ± 0.00 | magnitude, local | 89.00% ± 0.00 |"
        in text
    )


def test_the_front_has_no_point_that_another_beats(contest: Any) -> None:
    points = [(0.5, 0.9), (0.3, 0.8), (0.3, 0.7), (0.6, 0.85), (0.1, 0.8)]
    assert contest.page.pareto(points) == [(0.1, 0.8), (0.5, 0.9)]


def test_the_page_says_the_difference_and_what_failed(contest: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(tool, "m", seed, 0.9 + 0.01 * (tool == "dwindle"))
        for tool in ("dwindle", "torch-pruning")
        for seed in range(3)
    ]
    failed = {**row("nncf", "RB", 0, 0.0), "failure": "ImportError: no"}
    contest.page.write([*rows, failed], tmp_path)
    text = (tmp_path / "pruners.md").read_text()
    assert "| structured | digits | 50% | m | 91.00% ± 0.00 | m | 90.00% ± 0.00 | +1.00 ± 0.00 |" in text
    assert "- nncf: RB, digits: ImportError: no" in text
    assert (tmp_path / "pruners-structured-digits.png").stat().st_size > 1000
