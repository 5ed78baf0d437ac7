"""Signs of life of a worker while it works on a trial, and the claim to the trial that they keep up."""

from __future__ import annotations

import threading
import time

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from dwindle.search.studies.leases import Lease, Leases
from dwindle.search.studies.owner import is_alive

__all__ = ["Heart", "LeaseLost", "Watch"]


class LeaseLost(BaseException):
    """Another worker has the trial: this one was taken for dead."""


class Heart:
    """Renews a lease from a thread of its own.

    Args:
        leases: The leases of the storage.
        trial_id: The trial.
        lease: The lease as this worker took it.
        interval: Seconds from one sign of life to the next.
    """

    def __init__(self, leases: Leases, trial_id: int, lease: Lease, interval: float) -> None:
        self._leases, self._trial_id, self._lease, self._interval = leases, trial_id, lease, interval
        self._lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dwindle-heart", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost when the trial belongs to another worker."""
        if self._lost:
            raise LeaseLost

    def stop(self) -> None:
        """Give no more signs of life; then make sure once more that the trial is ours.

        Raises:
            LeaseLost: It is not.
        """
        self.rest()
        self.check()
        if not self._renew():
            raise LeaseLost

    def rest(self) -> None:
        """Give no more signs of life."""
        self._end.set()
        self._thread.join()

    def give_back(self) -> None:
        """Leave the trial to whoever comes next."""
        self.rest()
        if not self._lost:
            self._leases.swap(self._trial_id, self._lease.text(), self._lease.given_back().text())

    def _beat(self) -> None:
        while not self._end.wait(self._interval):
            try:
                if not self._renew():
                    self._lost = True
                    return
            except (StorageInternalError, OSError):
                continue  # a storage that is busy or away for a moment; the next sign of life may get through

    def _renew(self) -> bool:
        renewed = self._lease.renewed()
        try:
            kept = self._leases.swap(self._trial_id, self._lease.text(), renewed.text())
        except UpdateFinishedTrialError:
            return False
        if kept:
            self._lease = renewed
        return kept


class Watch:
    """Tells which holders of trials are dead.

    Clocks of several machines differ, so times are never compared: a lease is stale when *this* process has seen it
    unchanged for ``patience`` seconds, or when its holder was a process of this machine and is gone.

    Args:
        patience: Seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[int, tuple[str, float]] = {}

    def is_stale(self, trial: FrozenTrial, text: str) -> bool:
        """Tell whether a lease may be taken over.

        Args:
            trial: Whose lease.
            text: The lease.
        """
        owner = Lease.read(text).owner
        if owner is None or is_alive(owner) is False:
            return True
        before, since = self._since.get(trial._trial_id, ("", 0.0))
        if before != text:
            self._since[trial._trial_id] = (text, time.monotonic())
            return False
        return time.monotonic() - since >= self._patience
