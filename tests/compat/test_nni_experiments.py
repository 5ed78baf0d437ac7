"""NNI's experiments: one search space for pruner, ratios and quantizer, and targets that are met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.compat.nni.algorithms.compression.pytorch.auto_compress import (
    AbstractAutoCompressionModule,
    AutoCompressionExperiment,
    AutoCompressionSearchSpaceGenerator,
)
from dwindle.compat.nni.compression.experiment import CompressionExperiment, CompressionExperimentConfig
from dwindle.compat.nni.compression.experiment.config import (
    CompressionConfig,
    L1NormPrunerConfig,
    ObserverQuantizerConfig,
    QATQuantizerConfig,
    TaylorFOWeightPrunerConfig,
)
from dwindle.compat.nni.experiment.search_space import draw
from dwindle.config.errors import ConfigError

optuna = pytest.importorskip("optuna")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (128,), generator=generator)
    images = torch.randn(128, 1, 6, 6, generator=generator) + labels[:, None, None, None] * 1.5
    return images, labels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def train(model: nn.Module, optimizer: Any, criterion: Any, epoch: int = 0) -> None:
    images, labels = data()
    model.train()
    for own in range(0, 128, 32):
        optimizer.zero_grad()
        criterion(model(images[own : own + 32]), labels[own : own + 32]).backward()
        optimizer.step()


def finetune(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(4):
        train(model, optimizer, nn.functional.cross_entropy)


def accuracy(model: nn.Module) -> float:
    images, labels = data()
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def trained() -> nn.Sequential:
    model = network()
    for _ in range(4):
        finetune(model)
    return model


def experiment(**setting: Any) -> CompressionExperiment:
    config = CompressionExperimentConfig("local", CompressionConfig(**setting), max_trial_number=4)
    return CompressionExperiment(
        config,
        trained(),
        finetune,
        accuracy,
        torch.randn(2, 1, 6, 6),
        lambda model, optimizer, criterion: train(model, optimizer, criterion),
        torch.optim.Adam(network().parameters(), lr=1e-3),
        nn.functional.cross_entropy,
    )


def test_pruners_ratios_and_quantizers_under_targets() -> None:
    own = experiment(
        flops=0.6,
        metric=0.5,
        module_types=[nn.Conv2d, "Linear"],
        exclude_module_names=["6"],
        pruners=[L1NormPrunerConfig(), TaylorFOWeightPrunerConfig(training_batches=2)],
        quantizers=[None, ObserverQuantizerConfig(), QATQuantizerConfig()],
    )
    before = {name: value.clone() for name, value in own.materials.model.state_dict().items()}
    assert own.run(8080)
    assert own.result is not None
    assert not [trial.error for trial in own.result.trials if trial.error]
    best = own.result.best
    whole = best.attributes["original"]
    model = own.best_model()
    # By an independent count of the model that is made again.
    assert (
        dw.measure(model, (torch.randn(2, 1, 6, 6),), runtimes=[], latency=False).macs == best.costs["flops"]
    )
    assert best.costs["flops"] <= 0.6 * whole["flops"]
    assert accuracy(model) == best.costs["metric"] >= 0.5 * whole["metric"]
    ratio = best.parameters["module_name::0"]
    assert model[0].out_channels == 16 - int(16 * ratio) or model[0].out_channels == 16 - round(16 * ratio)
    assert {len(row["parameter"]) for row in own.export_data()} == {4}
    assert all(torch.equal(value, before[name]) for name, value in own.materials.model.state_dict().items())


def test_when_only_the_metric_has_a_target_the_model_is_made_small() -> None:
    own = experiment(metric=0.3, module_names=["0", "2"], pruners=[L1NormPrunerConfig()])
    own.run()
    assert own.result is not None
    assert own.result.objectives == {"flops": "minimize"}
    fitting = [t for t in own.result.trials if t.costs["metric"] >= 0.3 * t.attributes["original"]["metric"]]
    assert own.result.best.costs["flops"] == min(trial.costs["flops"] for trial in fitting)


class Module(AbstractAutoCompressionModule):
    @classmethod
    def model(cls) -> nn.Module:
        return trained()

    @classmethod
    def evaluator(cls) -> Any:
        return accuracy

    @classmethod
    def dummy_input(cls) -> Any:
        return torch.randn(2, 1, 6, 6)

    @classmethod
    def optimizer_factory(cls) -> Any:
        return lambda parameters: torch.optim.SGD(parameters, lr=0.01)

    @classmethod
    def criterion(cls) -> Any:
        return nn.functional.cross_entropy

    @classmethod
    def sparsifying_trainer(cls, compress_algorithm_name: str) -> Any:
        return train

    @classmethod
    def post_compress_finetuning_trainer(cls, compress_algorithm_name: str) -> Any:
        return train

    @classmethod
    def post_compress_finetuning_epochs(cls, compress_algorithm_name: str) -> int:
        return 1


def test_one_dict_for_everything() -> None:
    generator = AutoCompressionSearchSpaceGenerator()
    sparsity = {"_type": "uniform", "_value": [0.2, 0.8]}
    generator.add_config("l1", [{"sparsity": sparsity, "op_names": ["0", "2"]}])
    generator.add_config(
        "taylorfo", [{"sparsity": sparsity, "op_names": ["0"]}], sparsifying_training_batches=2
    )
    bits = {"weight": {"_type": "choice", "_value": [8, 4]}, "input": 8, "output": 8}
    quantized = {
        "quant_types": ["weight", "input", "output"],
        "quant_bits": bits,
        "op_types": ["Conv2d", "Linear"],
    }
    generator.add_config("observer", [quantized])
    generator.add_config(None, [])
    space = generator.dumps()
    again = AutoCompressionSearchSpaceGenerator()
    again.loads(space)
    assert again.dumps() == space

    own = AutoCompressionExperiment(Module, "local")
    own.config.experiment_name = "auto compression"
    own.config.max_trial_number = 6
    own.config.search_space = space
    own.config.tuner.name = "TPE"
    own.config.tuner.class_args["optimize_mode"] = "maximize"
    own.config.compression_setting.params = 0.9
    assert own.run(8088)
    assert own.result is not None
    assert not [trial.error for trial in own.result.trials if trial.error]
    assert own.result.best.costs["params"] <= 0.9 * own.result.best.attributes["original"]["params"]
    assert {trial.parameters["pruner"] for trial in own.result.trials} == {"l1", "taylorfo"}


def test_every_type_of_a_search_space() -> None:
    space = {
        "a": {
            "_type": "choice",
            "_value": [{"_name": "x", "deep": {"_type": "randint", "_value": [1, 4]}}, {"_name": "y"}],
        },
        "b": {"_type": "quniform", "_value": [0, 1, 0.25]},
        "c": {"_type": "loguniform", "_value": [0.001, 1]},
        "d": [{"_type": "normal", "_value": [5, 1]}, 7],
        "e": "plain",
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        found = draw(trial, space)
        assert found["a"]["_name"] == "y" or found["a"]["deep"] in (1, 2, 3)
        assert found["b"] in (0, 0.25, 0.5, 0.75, 1.0)
        assert 0.001 <= found["c"] <= 1
        assert 2 <= found["d"][0] <= 8
        assert found["d"][1] == 7
        assert found["e"] == "plain"
        study.tell(trial, 0.0)
    assert {name for own in study.trials for name in own.params} == {
        "a",
        "a/x/deep",
        "b",
        "c",
        "d/0/deviations",
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flops": 1.5, "pruners": [L1NormPrunerConfig()], "module_names": ["0"]}, "flops = 1.5"),
        ({"metric": 0, "pruners": [L1NormPrunerConfig()], "module_names": ["0"]}, "metric = 0"),
        ({"pruners": [L1NormPrunerConfig()], "module_names": ["00"]}, "no module '00'; did you mean '0'"),
        ({"pruners": [L1NormPrunerConfig()]}, "select no module"),
        ({}, "give pruners or quantizers"),
    ],
)
def test_mistakes(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(**setting).run()


def test_more_mistakes() -> None:
    with pytest.raises(ConfigError, match="did you mean 'taylorfo'"):
        AutoCompressionSearchSpaceGenerator().add_config("taylor", [])
    with pytest.raises(ConfigError, match=r"'uniferm' is not one of .*did you mean 'uniform'"):
        draw(optuna.create_study().ask(), {"x": {"_type": "uniferm", "_value": [0, 1]}})
    with pytest.raises(ConfigError, match="this machine"):
        CompressionExperimentConfig("remote")
    own = AutoCompressionExperiment(Module)
    with pytest.raises(ConfigError, match="search_space is empty"):
        own.run()
    own.config.tuner.name = "Tpe"
    with pytest.raises(ConfigError, match="did you mean 'TPE'"):
        own.run()
