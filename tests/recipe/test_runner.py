from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_task import RECIPE

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.recipe import Event, RunResult, run_recipe
from dwindle.recipe.directory import RunDirectory

SHORT = """
name: short
model: tiny_task:model
data: {name: tiny_task:labelled, batch_size: 32}
stages:
  - train: {epochs: 1}
  - prune: {ratio: 0.5}
  - finetune: {epochs: 1}
"""


class Run:
    """Runs recipes in one directory and notes what was done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events: list[Event] = []

    def __call__(self, text: str, **options: Any) -> RunResult:
        path = self.folder / "recipe.yaml"
        path.write_text(text)
        self.events.clear()
        return run_recipe(path, self.folder / "run", listener=self.events.append, **options)

    def labels(self, kind: str) -> list[str]:
        return [event.label for event in self.events if event.kind == kind]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_whole_recipe(run: Run) -> None:
    result = run(RECIPE)
    original, pruned, finetuned, quantized = result.summary.rows
    assert [row.title for row in result.summary.rows] == ["original", "pruned", "fine-tuned", "int8"]
    assert original.macs is not None
    assert quantized.macs is not None
    assert quantized.macs.mean < 0.6 * original.macs.mean
    # One Conv2d(1, 8), a BatchNorm2d(8), one Conv2d(8, 16), one Linear(16, 4); half of the channels go.
    assert original.parameters is not None
    assert pruned.parameters is not None
    assert original.parameters.mean == (9 + 1) * 8 + 16 + (72 + 1) * 16 + 17 * 4
    assert pruned.parameters.mean == (9 + 1) * 4 + 8 + (36 + 1) * 8 + 9 * 4
    assert finetuned.accuracy is not None
    assert finetuned.accuracy.mean > 0.5  # chance is 0.25
    assert quantized.runtimes["onnxruntime"].parity is not None
    assert quantized.runtimes["onnxruntime"].parity.mean >= 0.97
    assert quantized.runtimes["torch"].simulated
    assert not finetuned.runtimes["torch"].simulated
    proof = result.summary.seeds[0].stages[1]["result"]["proof"]
    assert proof["proven"]
    assert proof["max_difference"] < 1e-9
    assert result.report is not None
    assert result.report.is_file()
    stored = json.loads((result.directory / "summary.json").read_text())
    assert stored == json.loads(json.dumps(result.summary.to_json()))


def test_finished_stages_are_kept_and_a_change_redoes_what_follows(run: Run) -> None:
    first = run(SHORT)
    assert run.labels("finished") == ["train", "prune", "finetune"]
    again = run(SHORT)
    assert run.labels("finished") == []
    assert run.labels("skipped") == ["train", "prune", "finetune"]
    assert again.summary.table() == first.summary.table()
    run(SHORT.replace("ratio: 0.5", "ratio: 0.25"))
    assert run.labels("skipped") == ["train"]
    assert run.labels("finished") == ["prune", "finetune"]
    run(SHORT.replace("  - finetune: {epochs: 1}\n", "").replace("0.5", "0.25"))
    assert run.labels("finished") == []
    assert [path.name for path in sorted((run.folder / "run" / "seed-0").iterdir())] == [
        "00-train",
        "01-prune",
    ]
    run(SHORT, fresh=True)
    assert run.labels("finished") == ["train", "prune", "finetune"]


def test_same_recipe_gives_the_same_table_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert Run(tmp_path / "a")(SHORT).summary.table() == Run(tmp_path / "b")(SHORT).summary.table()


def test_training_goes_on_after_its_last_epoch(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = SHORT.replace("train: {epochs: 1}", "train: {epochs: 3}")
    epochs: list[str] = []

    def stop(event: Event) -> None:
        if event.kind == "advanced" and event.label == "train":
            epochs.append(event.text)
            if len(epochs) == 3:
                raise KeyboardInterrupt

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(path, tmp_path / "run", listener=stop)
    resumed = run(text)
    trained = [event.text for event in run.events if event.kind == "advanced" and event.label == "train"]
    assert len(trained) == 1
    assert trained[0].startswith("epoch 3 of 3")
    (tmp_path / "other").mkdir()
    assert Run(tmp_path / "other")(text).summary.table() == resumed.summary.table()


def test_directory_of_another_recipe(run: Run) -> None:
    run(SHORT.replace("  - prune: {ratio: 0.5}\n  - finetune: {epochs: 1}\n", ""))
    other = SHORT.replace("name: short", "name: other")
    with pytest.raises(ConfigError, match="holds the run of the recipe 'short', not of 'other'"):
        run(other)
    run(other, fresh=True)
    assert run.labels("finished") == ["train", "prune", "finetune"]


def test_foreign_directory_is_never_touched(run: Run) -> None:
    precious = run.folder / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("x")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not the directory of a run"):
            run(SHORT, fresh=fresh)
    assert [entry.name for entry in precious.parent.iterdir()] == ["thesis.txt"]


def test_two_processes_exclude_each_other(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path / "run").opened("r"),
        pytest.raises(DwindleError, match="another process"),
        RunDirectory(tmp_path / "run").opened("r"),
    ):
        pass


def test_without_labels_agreement_is_measured(run: Run) -> None:
    recipe = {
        "name": "post",
        "model": "tiny_task:model",
        "data": {
            "name": "tiny_task:unlabelled",
            "batch_size": 16,
            "calibration": {"name": "tiny_task:unlabelled", "arguments": {"count": 16}},
        },
        "stages": ["quantize", {"measure": {"runtimes": ["onnxruntime"], "repeats": 3}}, "report"],
    }
    summary = run(yaml.safe_dump(recipe)).summary
    assert summary.metric == "agreement"
    assert summary.samples == 40
    assert summary.original.agreement is not None
    assert summary.original.agreement.mean == 1.0
    assert summary.final.agreement is not None
    assert summary.final.agreement.mean > 0.8
    assert summary.final.accuracy is None


def test_seeds_differ_and_are_averaged(run: Run) -> None:
    text = SHORT.replace("name: short", "name: short\nseeds: [0, 1]")
    figure = run(text).summary.original.accuracy
    assert figure is not None
    assert len(figure.values) == 2
    assert figure.mean == pytest.approx(sum(figure.values) / 2)
    a, b = (
        (run.folder / "run" / f"seed-{seed}" / "00-train" / "model" / "model.safetensors") for seed in (0, 1)
    )
    assert a.read_bytes() != b.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tiny_task:model", "tiny_task:modle"), "has no 'modle'; did you mean 'model'"),
        (("tiny_task:model", "no_such_module:x"), "no module 'no_such_module'"),
        (
            ("{name: tiny_task:labelled", "{arguments: {part: 1}, name: tiny_task:labelled"),
            "has no argument 'part'",
        ),
        (("tiny_task:labelled", "tiny_task:model"), "the data 'tiny_task:model' gave a Sequential"),
    ],
)
def test_wrong_names(run: Run, change: tuple[str, str], message: str) -> None:
    with pytest.raises(DwindleError, match=message):
        run(SHORT.replace(*change))


@pytest.mark.parametrize("importance", ["taylor", "outputs"])
def test_importances_that_run_the_model_and_repair(run: Run, importance: str) -> None:
    prune = f"{{ratio: 0.5, importance: {importance}, scope: global, data_batches: 3, repair: true}}"
    result = run(SHORT.replace("{ratio: 0.5}", prune))
    repair = result.summary.seeds[0].stages[1]["result"]["repair"]
    assert repair["output_after"] <= repair["output_before"]


def test_repair_is_refused_beside_a_config_list(run: Run) -> None:
    prune = "{config_list: [{op_types: [Conv2d], sparse_ratio: 0.5}], repair: true}"
    with pytest.raises(ConfigError, match="repair goes with ratio, target, counts and blocks"):
        run(SHORT.replace("{ratio: 0.5}", prune))
