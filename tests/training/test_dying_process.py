"""A process dies in the middle of a training: the other one says so and goes, and the run resumes to the same bits."""

from __future__ import annotations

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dwindle.training import load_state
from support.spread_runs import METHODS, STEPS, Spread, exit_codes, network, processes, trained

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SAVED, DIES = 3, 5
PATIENCE = 120.0


def join(number: int, port: int) -> None:
    """Meet the other process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", rank=number, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )


def disturbed(number: int, port: int, directory: str) -> None:
    """Train undisturbed; then again, with a checkpoint, until the second process is gone."""
    join(number, port)
    folder = Path(directory)
    torch.save(trained(METHODS["fusion"], "shards before")[1], folder / f"undisturbed {number}.pt")
    spread = Spread(METHODS["fusion"], "shards before")
    begin = 0.0
    try:
        with spread.run:
            spread.start()
            for step in range(STEPS):
                if step == SAVED:
                    spread.save(folder / "checkpoint")
                if step == DIES:
                    begin = time.perf_counter()
                    if number == 1:
                        os._exit(7)
                spread.step(step)
    except RuntimeError as error:
        seconds = time.perf_counter() - begin
        local = {name: own.to_local() for name, own in spread.model.named_parameters()}  # type: ignore[operator]
        torch.save({"error": str(error), "seconds": seconds, "weights": local}, folder / "survivor.pt")
    os._exit(0)  # the group cannot be left in order any more


def resumed(number: int, port: int, directory: str) -> None:
    """Go on from the checkpoint, in processes that know nothing of the first two."""
    join(number, port)
    try:
        spread = Spread(METHODS["fusion"], "shards before")
        with spread.run:
            spread.start()
            spread.load(Path(directory) / "checkpoint")
            for step in range(SAVED, STEPS):
                spread.step(step)
            found = spread.found()
        torch.save(found, Path(directory) / f"resumed {number}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_the_others_say_so_and_the_run_resumes(tmp_path: Path) -> None:
    assert exit_codes(processes(disturbed, str(tmp_path))) == [0, 7]

    survivor = torch.load(tmp_path / "survivor.pt")
    assert survivor["error"]
    assert survivor["seconds"] < PATIENCE
    for name, own in network().named_parameters():  # put back as they were before the block
        part = own.detach()[: len(survivor["weights"][name])]
        assert torch.equal(survivor["weights"][name], part), name

    assert [own["steps"] for own in load_state(tmp_path / "checkpoint")["runs"]] == [SAVED]
    assert exit_codes(processes(resumed, str(tmp_path))) == [0, 0]
    for number in (0, 1):
        whole = torch.load(tmp_path / f"undisturbed {number}.pt")
        again = torch.load(tmp_path / f"resumed {number}.pt")
        assert list(whole) == list(again)
        for name, value in whole.items():
            assert torch.equal(value, again[name]), name
