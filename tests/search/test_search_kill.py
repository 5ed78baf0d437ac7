"""Searches in another process, killed with SIGKILL between or within trials, end as an unbroken one."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle.search import NetAdapt, Problem, SimulatedAnnealing, run_search
from search.models import images, nearness, tiny

ALGORITHMS = {"annealing": SimulatedAnnealing(stop_temperature=4), "netadapt": NetAdapt(step=0.3)}


def shake(small: nn.Module) -> None:
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def work(folder: Path, which: str) -> None:
    """The search of one process: every trial is noted when it begins, the result when all is done."""
    torch.set_num_threads(1)
    model = tiny()
    score = nearness(model)

    def noted(small: nn.Module) -> float:
        with (folder / "begun").open("a") as file:
            file.write("trial\n")
        return score(small)

    problem = Problem(model, images(2), noted, {"macs": 0.5}, fine_tune=shake)
    result = run_search(problem, ALGORITHMS[which], storage=folder)
    found = result.to_json()
    del found["best"]["seconds"], found["baseline"]["seconds"]
    found["weights"] = float(sum(p.double().abs().sum() for p in result.model.parameters()))
    (folder / "result.json").write_text(json.dumps(found))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def run(folder: Path, which: str, until: int | None = None) -> int | None:
    """Run the search in a process; kill it once its file has so many lines. Returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, which))
    process.start()
    while until is not None and process.is_alive() and lines(folder / "trials.jsonl") < until:
        time.sleep(0.001)
    if until is not None:
        process.kill()
    process.join(900)
    return process.exitcode


@pytest.mark.parametrize("which", sorted(ALGORITHMS))
def test_killed_searches_end_as_unbroken_ones(tmp_path: Path, which: str) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    assert run(unbroken, which) == 0
    kills = [run(broken, which, until) for until in (2, 3, 5)]
    assert kills == [-9, -9, -9]
    assert not (broken / "result.json").exists()
    assert run(broken, which) == 0
    assert json.loads((broken / "result.json").read_text()) == json.loads(
        (unbroken / "result.json").read_text()
    )
    for folder in (unbroken, broken):
        entries = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        keys = [entry["trial"]["key"] for entry in entries[1:]]
        assert len(keys) == len(set(keys))  # none is kept twice
    assert lines(broken / "trials.jsonl") == lines(unbroken / "trials.jsonl")
    # a kill costs at most the trial that was running
    assert lines(unbroken / "begun") <= lines(broken / "begun") <= lines(unbroken / "begun") + len(kills)
