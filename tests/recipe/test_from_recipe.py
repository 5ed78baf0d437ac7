"""One YAML file drives a training script: what it makes, what it refuses, and that nothing is touched before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.pruning.named_pruners import PRUNERS, TRAINING_METHODS
from dwindle.training import CubicSchedule, LinearSchedule, Staged

CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
LIST = "compression:\n  - pruning: {{config_list: [{{op_types: [{}], sparse_ratio: 0.5}}]"
HEADS = [{"op_names": ["q", "k", "v"], "sparse_ratio": 0.5}]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(count)]
    return [(own, torch.arange(8) % 4) for own in images]


def train(model: nn.Module, run: Any, epochs: int = 1) -> list[float]:
    """Train in a plain loop, inside the block; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.add_parameters_to(optimizer)
    losses = []
    for _ in range(epochs):
        for x, y in batches():
            loss = run.task_weight * nn.functional.cross_entropy(model(x), y) + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            losses.append(float(loss.detach()))
    return losses


def one(**algorithm: Any) -> dict[str, Any]:
    return {"compression": [algorithm]}


def test_a_file_drives_the_whole_chain_to_an_integer_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
task_weight: 0.1
compression:
  - pruning:
      method: taylor
      config_list: [{op_names: ["0", "3"], sparse_ratio: 0.5}]
      schedule: agp
      stop: {epoch: 1}
  - quantization: {method: lsq, start: {epoch: 1}, calibration_batches: 2}
  - distillation: {weight: {linear: {start: 0.9, end: 0.5, steps: {epoch: 2}}}, temperature: 2}
"""
    )
    model = net()
    teacher = copy.deepcopy(model)
    x = torch.randn(2, 1, 6, 6)
    run = dw.from_recipe(
        model, path, example_inputs=(x,), calibration_data=batches(), teacher=teacher, steps_per_epoch=6
    )
    with run:
        assert run.task_weight == 0.1
        train(model, run, epochs=3)
        small = run.realize(example_inputs=(x,)).model
    assert small[0].out_channels == small[3].out_channels == 4
    assert not any("parametriz" in name for name, _ in teacher.named_modules())
    exported = dw.export(small, tmp_path / "model.onnx", example_inputs=(x,))
    assert exported is not None
    assert (tmp_path / "model.onnx").is_file()


def test_moments_become_steps_and_schedules_their_classes() -> None:
    recipe = {
        "compression": [
            {
                "pruning": {
                    "config_list": CONVS,
                    "schedule": "cubic",
                    "start": {"share": 0.1},
                    "stop": {"share": 0.5},
                }
            },
            {
                "distillation": {
                    "teacher": "copy",
                    "start": {"epoch": 0.5},
                    "stop": 40,
                    "weight": {"linear": {"start": 1.0, "end": 0.0, "begin_step": 2, "steps": {"epoch": 1}}},
                }
            },
        ],
        "task_weight": {"linear": {"start": 0.0, "end": 1.0, "steps": {"share": 1.0}}},
    }
    run = dw.from_recipe(net(), recipe, steps_per_epoch=20, training_steps=100)
    pruning, distilling = run.compressors
    assert isinstance(pruning, Staged)
    assert isinstance(distilling, Staged)
    assert pruning.window == (10, None)
    scheduled: Any = pruning.compressor
    assert scheduled.schedule == CubicSchedule(0.0, 1.0, 40)
    assert scheduled.interval == 2
    assert distilling.window == (10, 40)
    distiller: Any = distilling.compressor
    assert distiller.logits_weight == LinearSchedule(1.0, 0.0, 20, begin_step=2)
    assert run.task_weight == 0.0
    run.steps = 50
    assert run.task_weight == 0.5


@pytest.mark.parametrize("method", sorted({*PRUNERS, "group_sparsity"}))
def test_every_method_runs_in_its_way(method: str) -> None:
    model = net()
    said: dict[str, Any] = {"method": method, "config_list": CONVS}
    if method in ("hrank", "chip", "apoz", "mean_activation"):
        said["config_list"] = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    if method == "slim":
        said["config_list"] = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    if method == "sr_ste":
        said["config_list"] = [{"op_names": ["3"], "sparse_ratio": 0.5, "granularity": "2:4"}]
    if method == "heads":
        model, said = attention(), {"method": "heads", "config_list": HEADS}
    if method == "group_sparsity":
        del said["config_list"]
    if method in TRAINING_METHODS:
        said["stop"] = 4
    if method in ("admm", "rigl"):
        said["options"] = {"interval_steps": 2}
    if method in ("wanda", "sparse_gpt", "snip", "obd", "taylor", "apoz", "hrank", "chip", "mean_activation"):
        said["batches"] = 2
    kind = "sparsity_training" if method in TRAINING_METHODS else "pruning"
    data = [(torch.randn(2, 5, 12), torch.zeros(2, dtype=torch.int64))] if method == "heads" else batches()
    with dw.from_recipe(model, one(**{kind: said}), calibration_data=data) as run:
        if method == "heads":
            run.step()
        else:
            losses = train(model, run)
            assert all(value == value for value in losses)
    if method != "group_sparsity":
        gone = [
            float((own == 0).float().mean())
            for own in model.parameters()
            if own.dim() > 1 or method == "slim"
        ]
        assert max(gone) >= 0.4


def attention() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                own(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for own in (self.q, self.k, self.v)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)

    return Attention()


def test_low_rank_and_binary_from_words() -> None:
    model = net()
    recipe = {
        "compression": [
            {"factorization": {"config_list": [{"op_names": ["7"], "rank": 2}], "stop": 4}},
            {
                "binarization": {
                    "config_list": [
                        {"op_names": ["3"], "target_names": ["weight", "_input_0"], "quant_dtype": "int1"}
                    ],
                    "start": 1,
                    "start_weights": 2,
                }
            },
        ]
    }
    with dw.from_recipe(model, recipe, example_inputs=torch.randn(2, 1, 6, 6)) as run:
        train(model, run)
    weight = model[7].weight.detach()
    assert int(torch.linalg.matrix_rank(weight)) == 2
    binary: Any = run.compressors[1]
    assert binary._optimizer is not None
    assert binary.stages.activations == 1
    assert binary.stages.weights == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", ["r.yaml", "key 'compression'"]),
        ("stages: []", ["r.yaml:1: stages", "dwindle run"]),
        ("compresion: []", ["list of algorithms", "pruning"]),
        (
            "compression:\n  - prunning: {}",
            ["r.yaml:2: compression[0].prunning", "did you mean 'pruning'?"],
        ),
        (
            "compression:\n  - pruning: {config_lists: []}",
            ["compression[0].pruning.config_lists", "did you mean 'config_list'?"],
        ),
        ("compression: [pruning]", ["compression[0].pruning: the key 'config_list' is missing"]),
        ("compression:\n  - pruning: {method: tailor, config_list: [{}]}", ["did you mean 'taylor'?"]),
        ("compression:\n  - sparsity_training: {method: l1, config_list: [{}]}", ["'l1' is not one of"]),
        (
            LIST.format("Conv2d") + ", schedule: cubi, stop: 3}",
            ["compression[0].pruning.schedule", "did you mean 'cubic'?"],
        ),
        (
            LIST.format("Conv2d") + ", schedule: cubic}",
            ["needs a 'stop'"],
        ),
        (
            LIST.format("Conv2d") + ", stop: 3}",
            ["r.yaml:2: compression[0].pruning.stop", "give a 'schedule' too"],
        ),
        (
            LIST.format("Conv2") + "}",
            ["r.yaml:2: compression[0].pruning", "did you mean 'Conv2d'?"],
        ),
        (
            "compression:\n  - pruning:\n      method: movement\n"
            "      config_list: [{op_types: [Linear], sparse_ratio: 0.5}]\n"
            "      stop: 9\n      options: {warmup: 2}",
            [
                "r.yaml:6: compression[0].pruning.options",
                "no option 'warmup'",
                "did you mean 'warmup_steps'?",
            ],
        ),
        (
            "compression:\n  - pruning: {method: movement, config_list: [{op_types: [Linear], sparse_ratio: 0.5}]}",
            ["the key 'stop' is missing: when the masks stand"],
        ),
        ("compression:\n  - quantization: {stop: {epoch: 2}}", ["quantization.stop", "steps_per_epoch"]),
        ("compression:\n  - quantization: {start: {share: 0.5}}", ["quantization.start", "training_steps"]),
        ("compression:\n  - quantization: {start: {epochs: 1}}", ["start.epochs", "did you mean 'epoch'?"]),
        ("compression:\n  - quantization: {start: 5, stop: 5}", ["step 5 is not behind the start"]),
        ("compression:\n  - quantization: {method: lqs}", ["did you mean 'lsq'?"]),
        ("compression:\n  - quantization", ["compression[0].quantization", "calibration_data"]),
        ("compression:\n  - distillation", ["distillation.teacher", "teacher: copy"]),
        (
            "compression:\n  - distillation: {teacher: copy, weight: {liner: {start: 1, end: 0, steps: 3}}}",
            ["distillation.weight", "did you mean 'linear'?"],
        ),
        (
            "compression:\n  - distillation: {teacher: copy, weight: {linear: {start: 1, end: 0, stps: 3}}}",
            ["distillation.weight", "did you mean 'steps'?"],
        ),
        ("compression:\n  - factorization: {target: {macs: 0.5}}", ["'stop' is missing"]),
        ("compression:\n  - factorization: {target: {macs: 0.5}, stop: 5}", ["example_inputs"]),
        (
            "compression:\n  - pruning: {method: wanda, config_list: [{op_types: [Linear], sparse_ratio: 0.5}]}",
            ["method 'wanda' without a 'stop'", "calibration_data"],
        ),
    ],
)
def test_refusals_name_file_entry_key_and_choice(text: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    model = net()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        dw.from_recipe(model, path)
    for part in expected:
        assert part in str(caught.value)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


def test_refusals_of_arguments(tmp_path: Path) -> None:
    recipe = one(distillation={})
    with pytest.raises(ConfigError, match="teacher must be a"):
        dw.from_recipe(net(), recipe, teacher="ema")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps_per_epoch: 0"):
        dw.from_recipe(net(), recipe, steps_per_epoch=0)
    (tmp_path / "mine.yaml").write_text("x")
    with pytest.raises(ConfigError, match=r"no recipe .*did you mean 'mine.yaml'"):
        dw.from_recipe(net(), tmp_path / "min.yaml")
    both = {"compression": [{"pruning": {"config_list": CONVS}}, {"pruning": {"config_list": CONVS}}]}
    with pytest.raises(ConfigError, match=r"recipe: compression: .*both mask"):
        dw.from_recipe(net(), both)


def test_the_same_list_serves_a_finetune_stage(tmp_path: Path) -> None:
    from dwindle.recipe import parse_recipe, run_recipe

    ranks = {"config_list": [{"op_names": ["8"], "rank": 1}], "stop": {"share": 0.9}}
    listed: list[dict[str, Any]] = [
        {
            "pruning": {
                "config_list": [{"op_names": ["3"], "sparse_ratio": 0.5}],
                "schedule": "linear",
                "stop": {"epoch": 1},
            }
        },
        {
            "quantization": {
                "calibration_batches": 2,
                "start": {"share": 0.5},
                "config_list": [
                    {"op_names": ["8"], "target_names": ["weight", "_input_0"], "quant_dtype": None}
                ],
            }
        },
        {"distillation": {"weight": 0.5}},
        {"factorization": ranks},
    ]
    content = {
        "name": "listed",
        "model": "tiny_task:model",
        "data": {"name": "tiny_task:labelled", "batch_size": 32},
        "stages": [
            {"train": {"epochs": 3, "learning_rate": 0.03}},
            {"finetune": {"epochs": 2, "learning_rate": 0.01, "task_weight": 0.5, "compression": listed}},
            {"export": {"formats": ["onnx"]}},
        ],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    result = run_recipe(path, tmp_path / "run")
    directory = next(
        own.parent for own in (tmp_path / "run").rglob("model.safetensors") if "finetune" in str(own)
    )
    model: Any = dw.load(directory)
    shapes = [tuple(own.shape) for own in model.state_dict().values() if own.dim() == 4]
    assert (8, 8, 3, 3) in shapes
    assert sorted(tuple(own.shape) for own in model[8].parameters() if own.dim() == 2) == [(1, 8), (4, 1)]
    assert result.summary.rows[-1].accuracy.mean > 0.3  # type: ignore[union-attr]

    content["stages"][1]["finetune"]["distillation"] = {"weight": 0.5}  # type: ignore[index]
    with pytest.raises(ConfigError, match="as an entry of 'compression'"):
        parse_recipe(yaml.safe_dump(content))
    del content["stages"][1]["finetune"]["distillation"]  # type: ignore[index]
    listed[0]["pruning"]["shedule"] = "linear"
    with pytest.raises(
        ConfigError, match=r"finetune.compression\[0\].pruning.shedule.*did you mean 'schedule'"
    ):
        parse_recipe(yaml.safe_dump(content))


ROOT = Path(__file__).parents[2]


def test_the_recipes_of_the_samples_and_of_the_page_are_valid() -> None:
    from dwindle.recipe import parse_recipe
    from dwindle.recipe.compression.reading import read_compression

    found = sorted((ROOT / "samples").glob("*/*.yaml"))
    assert len(found) >= 6
    for path in found:
        said, _ = read_compression(path)
        assert said.title
    page = (ROOT / "docs/recipes.md").read_text()
    (stages,) = [text.split("```")[0] for text in page.split("```yaml\n")[1:]]
    finetune = parse_recipe(f"name: page\nmodel: a.b:c\ndata: a.b:d\n{stages}").stages[1]
    assert len(finetune.compression) == 3  # type: ignore[attr-defined]
    assert all(f"`{name}`" in page for name in PRUNERS)
