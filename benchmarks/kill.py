"""Kills a recipe's run at random moments, resumes it, and compares its final table with that of an unbroken run.

python benchmarks/kill.py recipes/digits.yaml --kills 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = "import sys; from dwindle.cli import main; sys.argv[0] = 'dwindle'; main()"


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start ``dwindle run`` in a process of its own."""
    command = [sys.executable, "-c", START, "run", str(recipe), "--output", str(output), "--json"]
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def finish(recipe: Path, output: Path) -> float:
    """Run to the end; return the seconds it took."""
    begin = time.perf_counter()
    process = start(recipe, output)
    if process.wait() != 0:
        raise RuntimeError((output.parent / f"{output.name}.log").read_text()[-2000:])
    return time.perf_counter() - begin


def kill_after(recipe: Path, output: Path, seconds: float) -> bool:
    """Run until so many seconds after the first stage was begun, then SIGKILL; whether it was still running."""
    process = start(recipe, output)
    while process.poll() is None and not any(output.glob("seed-*/.*.partial")):
        time.sleep(0.01)
    time.sleep(seconds)
    alive = process.poll() is None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def table_of(output: Path) -> list[dict[str, Any]]:
    """The final table of a finished run: every figure but times."""
    from dwindle.report import RunSummary

    return RunSummary.from_json(json.loads((output / "summary.json").read_text())).table()


def run_killed(recipe: Path, output: Path, kills: int, longest: float, seed: int = 0) -> int:
    """Kill and resume a run, then let it end.

    Args:
        recipe: The recipe.
        output: Its directory.
        kills: How often to kill it.
        longest: The largest number of seconds before a kill.
        seed: Decides the moments.

    Returns:
        How often it was really killed (a run that had ended cannot be).
    """
    moments = random.Random(seed)
    done = sum(kill_after(recipe, output, moments.uniform(0.0, longest)) for _ in range(kills))
    finish(recipe, output)
    return done


def main() -> None:
    """Compare an unbroken run with a killed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        seconds = finish(options.recipe, unbroken)
        print(f"unbroken: {seconds:.1f} s")
        # Each resumption goes on, so the moments of all kills together lie within the whole run.
        done = run_killed(
            options.recipe, broken, options.kills, 2 * seconds / (options.kills + 1), options.seed
        )
        same = table_of(unbroken) == table_of(broken)
        print(f"killed {done} times and resumed: {'the same final table' if same else 'ANOTHER final table'}")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
