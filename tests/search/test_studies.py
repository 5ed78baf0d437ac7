"""Studies: what they find, that they resume, and that proposals depend on what they may depend on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from study_subjects import Fragile, Front, Hill

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.search import StudyResult, SubjectMaker, load_study, run_study, work_on_study

optuna = pytest.importorskip("optuna")

PLACES = ["sqlite", "journal"]


def place(kind: str, folder: Path) -> str:
    return str(folder / "study.db") if kind == "sqlite" else f"journal:{folder / 'study.log'}"


def core(result: StudyResult) -> list[Any]:
    """What must not depend on how often a study was interrupted, nor on who worked on it."""
    return [
        (t.number, t.state, dict(t.parameters), dict(t.values), dict(t.violations), t.error)
        for t in result.trials
    ]


def test_finds_the_best_under_a_constraint() -> None:
    result = run_study(Hill(limit=4), trials=60)
    best = result.best
    assert best.candidate is not None
    assert best.candidate["n"] <= 4  # the top of the hill, n = 5, is not allowed
    assert best.values["score"] == max(t.values["score"] for t in result.trials if t.violations["n"] <= 0)
    assert best.values["score"] > 0.5  # 0.7 is the most there is
    assert best.costs == {"bytes": 100.0 * best.candidate["n"]}
    assert best.attributes == {"twice": [best.candidate["n"]] * 2}
    # Drawn by chance alone, the same number of trials finds less.
    assert best.values["score"] > run_study(Hill(limit=4), trials=60, sampler="random").best.values["score"]


def test_a_front_of_score_and_cost() -> None:
    result = run_study(Front(limit=7), trials=60, sampler="nsga2", sampler_options={"population_size": 10})
    points = [(t.values["score"], t.values["bytes"]) for t in result.trials if t.feasible]
    expected = {p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)}
    assert {(t.values["score"], t.values["bytes"]) for t in result.front} == expected
    assert len(expected) >= 4
    with pytest.raises(DwindleError, match="see its front"):
        _ = result.best
    assert all(t.violations["n"] <= 0 for t in result.front)


@pytest.mark.parametrize("kind", PLACES)
def test_goes_on_where_it_stood(kind: str, tmp_path: Path) -> None:
    whole = run_study(Hill(), trials=20, seed=3)
    run_study(Hill(), trials=7, seed=3, storage=place(kind, tmp_path))
    resumed = run_study(Hill(), trials=20, seed=3, storage=place(kind, tmp_path))
    assert core(resumed) == core(whole)
    assert core(load_study(place(kind, tmp_path), "study")) == core(whole)
    assert run_study(Hill(), trials=5, seed=3, storage=place(kind, tmp_path)).wanted == 20
    other = run_study(Hill(), trials=20, seed=4)
    assert core(other) != core(whole)


def test_a_generation_sees_the_generations_before_it_alone() -> None:
    # An independent reading of the rule: the sampler, seeded for the trial, on Optuna's own study of what may be seen.
    from dwindle.search.studies.named import make_sampler
    from dwindle.search.studies.plan import Thinking, open_plan
    from dwindle.search.studies.storage import open_storage

    result = run_study(Hill(), trials=24, generation=6, sampler_options={"n_startup_trials": 5})
    plan = open_plan(open_storage(None), "study", Hill(), None, Thinking(generation=6), 24)
    for number in (0, 7, 12, 17, 23):
        study = optuna.create_study(
            direction="maximize",
            sampler=make_sampler("tpe", plan.seed_of(number), 4, {"n_startup_trials": 5}),
        )
        for trial in result.trials[: number - number % 6]:
            own = optuna.create_study(direction="maximize")
            own.enqueue_trial(dict(trial.parameters))
            asked = own.ask()
            Hill().suggest(asked)
            asked.set_constraint("n", trial.violations["n"])
            own.tell(asked, trial.values["score"])
            study.add_trial(own.trials[0])
        asked = study.ask()
        Hill().suggest(asked)
        assert asked.params == result.trials[number].parameters


def test_warm_starts_come_first() -> None:
    given = [{"x": 1.0, "n": 5, "kind": "bonus", "bonus": 1.0}, {"x": -2.0}]
    result = run_study(Hill(), trials=8, enqueue=given)
    assert result.trials[0].parameters == given[0]
    assert result.best.number == 0
    assert result.trials[1].parameters["x"] == -2.0
    assert {"x", "n", "kind"} <= set(result.trials[1].parameters)


def test_hopeless_trials_are_stopped() -> None:
    result = run_study(Hill(), trials=30, pruner="median", pruner_options={"n_startup_trials": 4})
    stopped = [trial for trial in result.trials if trial.state == "pruned"]
    assert stopped
    assert all(not trial.values and not trial.feasible for trial in stopped)
    assert not any(trial.error for trial in result.trials)
    assert math.isclose(
        result.best.values["score"], max(t.values["score"] for t in result.trials if t.feasible)
    )
    with pytest.raises(ConfigError, match="leave it out"):
        run_study(Front(), trials=3, pruner="median")


def test_failures_are_kept_and_do_not_stop_a_study() -> None:
    result = run_study(Fragile(), trials=20)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert {trial.error for trial in failed} == {"RuntimeError: x is below 0"}
    assert all(trial.parameters["x"] < 0 for trial in failed)
    assert len(result.trials) == 20

    class Hopeless(Fragile):
        def assess(self, candidate: Any, report: Any) -> Any:
            raise ValueError("never")

    with pytest.raises(DwindleError, match="the first failed with: ValueError: never"):
        run_study(Hopeless(), trials=3)
    with pytest.raises(
        DwindleError, match="its first 10 trials all failed; the first with: ValueError: never"
    ):
        run_study(Hopeless(), trials=300)


@pytest.mark.parametrize("kind", PLACES)
def test_another_study_is_refused(kind: str, tmp_path: Path) -> None:
    where = place(kind, tmp_path)
    run_study(Hill(), trials=2, storage=where)
    with pytest.raises(ConfigError, match="another study 'study': limit differ"):
        run_study(Hill(limit=3), trials=2, storage=where)
    with pytest.raises(ConfigError, match="seed differ"):
        run_study(Hill(), trials=2, storage=where, seed=1)
    with pytest.raises(ConfigError, match=r"no study 'stody'.*did you mean 'study'"):
        load_study(where, "stody")
    with pytest.raises(ConfigError, match="about another subject"):
        work_on_study(where, "study", subject=Hill(limit=3))
    with pytest.raises(ConfigError, match="does not say how its subject is made"):
        work_on_study(where, "study")
    run_study(Hill(limit=3), trials=2, storage=where, name="second")
    assert len(load_study(where, "study").trials) == len(load_study(where, "second").trials) == 2


def test_what_cannot_be_is_said_before_any_work(tmp_path: Path) -> None:
    for arguments, message in (
        ({"sampler": "tpee"}, "did you mean 'tpe'"),
        ({"pruner": "medium"}, "did you mean 'median'"),
        ({"sampler_options": {"n_startup": 3}}, "the sampler 'tpe'"),
        ({"storage": "redis:somewhere"}, "cannot tell which storage"),
        ({"storage": tmp_path}, "is a directory"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"workers": 2}, "SubjectMaker"),
        ({"generation": 0}, "generation must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_study(Hill(), **{"trials": 2, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="several processes need a storage"):
        run_study(SubjectMaker("study_subjects:hill"), trials=2, workers=2)
    with pytest.raises(ConfigError, match="has no argument 'puase'"):
        run_study(SubjectMaker("study_subjects:hill", {"puase": 1}), trials=2)
    with pytest.raises(ConfigError, match="does not exist"):
        load_study(tmp_path / "nothing.db", "study")
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_of_a_journal_does_no_harm(tmp_path: Path) -> None:
    where = place("journal", tmp_path)
    whole = run_study(Hill(), trials=12)
    run_study(Hill(), trials=5, storage=where)
    with (tmp_path / "study.log").open("ab") as stream:
        stream.write(b'{"op_code":6,"worker_id":"a killed one","trial')
    assert core(run_study(Hill(), trials=12, storage=where)) == core(whole)


def test_optuna_reads_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    run_study(Hill(), trials=12, storage=path)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{path}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    assert study.best_trial.constraints["n"] <= 0
    assert study.metric_names == ["score"]
    assert study.trials[3].user_attrs["cost.bytes"] == 100 * study.trials[3].params["n"]


@pytest.mark.parametrize("kind", PLACES)
def test_the_dashboard_opens_the_storage(kind: str, tmp_path: Path) -> None:
    from wsgiref.util import setup_testing_defaults

    dashboard = pytest.importorskip("optuna_dashboard")
    run_study(Hill(), trials=3, storage=place(kind, tmp_path))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    )
    if kind == "sqlite":
        storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    application = dashboard.wsgi(storage)

    def asked(path: str) -> Any:
        environment: dict[str, Any] = {}
        setup_testing_defaults(environment)
        environment["PATH_INFO"] = path
        return json.loads(b"".join(application(environment, lambda status, headers, error=None: None)))

    (study,) = asked("/api/studies")["study_summaries"]
    trials = asked(f"/api/studies/{study['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete"] * 3
    assert "cost.bytes" in {entry["key"] for entry in trials[0]["user_attrs"]}


def test_what_mattered() -> None:
    from sklearn.feature_selection import f_classif

    from dwindle.search.studies.importances import importances

    chance = random.Random(0)
    rows = [{"a": chance.choice("xyz"), "b": chance.random(), "c": chance.randrange(3)} for _ in range(60)]
    values = [{"x": 0.0, "y": 1.0, "z": 3.0}[row["a"]] + 0.3 * row["b"] for row in rows]  # c does nothing
    found = importances(rows, values)
    assert next(iter(found)) == "a"
    assert found["a"] > 0.97
    assert found["b"] < 0.1
    # Against scikit-learn's F statistic, which has the same sums of squares.
    for name in ("a", "c"):
        f = f_classif([[value] for value in values], [str(row[name]) for row in rows])[0][0]
        expected = max(0.0, 1.0 - 59 / 57 / (1.0 + f * 2 / 57))
        assert found[name] == pytest.approx(expected, abs=1e-9)
    assert importances(rows[:3], values[:3]) == {}


def test_exported() -> None:
    assert dw.search.run_study is run_study
