"""Workers as tasks of Ray, on a cluster or here. Ray only starts them; who does which trial, the leases say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dwindle.config.errors import require
from dwindle.search.studies.plan import StudyPlan

__all__ = ["run_with_ray"]


def run_with_ray(
    plan: StudyPlan, workers: int, *, heartbeat: float, patience: float, poll: float = 1.0
) -> Iterator[int]:
    """Let Ray keep workers at work until the study is finished; yield how many trials are, whenever that changes.

    A task that dies is started again by Ray; its trial is taken over by the next worker. Nodes need dwindle, and must
    reach the storage by the same place.

    Args:
        plan: The study.
        workers: How many tasks, of one processor core each.
        heartbeat: Seconds between two signs of life of each.
        patience: As of :class:`~dwindle.search.studies.work.Worker`.
        poll: Seconds between two looks.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    ray: Any = require("ray", "ray")
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=-1)(_work)
        pending = [task.remote(plan.storage.place, plan.name, heartbeat, patience) for _ in range(workers)]
        before = -1
        while pending:
            ended, pending = ray.wait(pending, timeout=poll)
            done = sum(trial.state.is_finished() for trial in plan.all_trials())
            if done != before:
                before = done
                yield done
            for own in ended:
                ray.get(own)  # raises what a worker raised
    finally:
        if begun:
            ray.shutdown()


def _work(place: str, name: str, heartbeat: float, patience: float) -> int:
    """One worker."""
    from dwindle.search.studies.running import work_on_study

    return work_on_study(place, name, heartbeat=heartbeat, patience=patience, progress=False)
