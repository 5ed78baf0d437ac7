"""A worker process of :func:`~dwindle.search.studies.processes.run_processes`."""

from __future__ import annotations

import logging
import signal
import sys
import warnings

from dwindle.config.errors import DwindleError
from dwindle.search.studies.running import work_on_study


def main(storage: str, name: str, heartbeat: str, patience: str) -> None:
    """Work on a study until it is finished."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # The default ends a process at once; so its trial is given back, and nobody waits for signs of life.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        work_on_study(storage, name, heartbeat=float(heartbeat), patience=float(patience), progress=False)
    except DwindleError as error:
        print(f"dwindle: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
