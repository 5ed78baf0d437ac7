"""A run killed with SIGKILL and resumed ends with the same final table."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from tiny_task import RECIPE

ROOT = Path(__file__).parents[2]


def _kill_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_kill", ROOT / "benchmarks" / "kill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return _kill_module()


def test_killed_run_ends_as_an_unbroken_one(tmp_path: Path, kill: ModuleType) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    kill.finish(recipe, tmp_path / "unbroken")
    done = kill.run_killed(recipe, tmp_path / "broken", kills=3, longest=0.8, seed=1)
    assert done >= 2
    assert kill.table_of(tmp_path / "broken") == kill.table_of(tmp_path / "unbroken")
    assert not list((tmp_path / "broken").glob("seed-*/.*"))


@pytest.mark.slow
def test_demo_killed_ten_times(tmp_path: Path, kill: ModuleType) -> None:
    recipe = ROOT / "recipes" / "digits.yaml"
    seconds = kill.finish(recipe, tmp_path / "unbroken")
    assert kill.run_killed(recipe, tmp_path / "broken", kills=10, longest=2 * seconds / 11, seed=0) == 10
    assert kill.table_of(tmp_path / "broken") == kill.table_of(tmp_path / "unbroken")
