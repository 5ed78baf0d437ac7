"""NNI's searches: they meet their total, put the model back after each trial, and run their documented examples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import DUMMY, batches, evaluate, finetuner, padded, trainer, training_func
from dwindle import simulate
from dwindle.compat import nni
from dwindle.compat.nni import v2
from dwindle.compat.nni.v2.annealed import Allocation
from dwindle.config.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONV: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "total_sparsity": 0.5}]
NAMES = ("conv1", "conv2", "conv3")
WEIGHTS = 8 * 27 + 12 * 72 + 12 * 108


def score(model: nn.Module) -> float:
    """Cheap, and better for models that keep the first convolution."""
    model.eval()
    with torch.no_grad():
        model(DUMMY)
        return float((model.conv1.weight != 0).float().mean())  # type: ignore[operator, union-attr]


def gone(masks: Any) -> int:
    return sum(int((masks[name]["weight"] == 0).sum()) for name in NAMES)


def test_ratios_are_fitted_to_the_total_within_bounds() -> None:
    allocation = Allocation({"a": 100, "b": 300}, {"a": 0.0, "b": 0.2}, {"a": 0.5, "b": 0.9}, 0.4)
    ratios = allocation.fitted({"a": 0.9, "b": 0.1})
    assert 100 * ratios["a"] + 300 * ratios["b"] == pytest.approx(160, abs=1e-6)
    assert ratios["a"] == pytest.approx(0.5)
    assert ratios["b"] == pytest.approx(110 / 300)
    with pytest.raises(ConfigError, match="not within the bounds"):
        Allocation({"a": 100}, {"a": 0.0}, {"a": 0.5}, 0.6).fitted({"a": 1.0})


@pytest.mark.parametrize("form", ["new", "old"])
def test_simulated_annealing_meets_the_total_and_finds_what_scores(form: str) -> None:
    model = padded()
    before = copy.deepcopy(model.state_dict())
    seen: list[dict[str, Any]] = []

    def watched(model: nn.Module) -> float:
        seen.append(
            {name: value.clone() for name, value in model.state_dict().items() if "_dwindle" not in name}
        )
        return score(model)

    given: dict[str, Any] = {"start_temperature": 1.0, "stop_temperature": 0.05, "cool_down_rate": 0.8}
    if form == "new":
        optimizer = None
        own = v2.TorchEvaluator(None, optimizer, None, evaluating_func=watched)
        pruner = v2.SimulatedAnnealingPruner(model, CONV, own, **given)
    else:
        pruner = v2.SimulatedAnnealingPruner(model, CONV, evaluator=watched, finetuner=None, **given)
    pruner.compress()
    _, best, masks, value, _ = pruner.get_best_result()
    assert best is model
    assert abs(gone(masks) - WEIGHTS / 2) <= 3
    assert all(
        torch.equal(state[name], before[name]) for state in seen for name in before
    )  # put back each time
    assert value == pytest.approx(1 - pruner.ratios["conv1.weight"], abs=0.01)
    assert pruner.ratios["conv1.weight"] < 0.3  # what scores is kept
    assert len(seen) > 10


def test_simulated_annealing_with_channels_training_and_speedup() -> None:
    model = padded()
    pruner = v2.SimulatedAnnealingPruner(
        model,
        [{"op_names": ["conv1"], "total_sparsity": 0.5}],
        evaluator=score,
        start_temperature=1.0,
        stop_temperature=0.7,
        pruning_algorithm="l1",
        finetuner=finetuner,
        speedup=True,
        dummy_input=DUMMY,
    )
    pruner.compress()
    _, best, _, _, _ = pruner.get_best_result()
    assert best.conv1.out_channels == best.conv2.in_channels == 4
    evaluate(best)


@pytest.mark.parametrize("speedup", [False, True])
def test_auto_compress_as_documented(speedup: bool) -> None:
    model = padded()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    admm = {
        "trainer": trainer,
        "traced_optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "iterations": 2,
        "training_epochs": 1,
    }
    search: dict[str, Any] = {"evaluator": score, "start_temperature": 1.0, "stop_temperature": 0.7}
    config = CONV
    if speedup:
        admm["granularity"] = "coarse-grained"
        search["pruning_algorithm"] = "l1"
        config = [{"op_names": ["conv1"], "total_sparsity": 0.5}]
    pruner = v2.AutoCompressPruner(
        model, config, 2, admm, search, finetuner=finetuner, speedup=speedup, dummy_input=DUMMY
    )
    pruner.compress()
    _, best, masks, _, _ = pruner.get_best_result()
    if speedup:
        assert best.conv1.out_channels == 4
    else:
        assert abs(gone(masks) - WEIGHTS / 2) <= 6
    evaluate(best)


def test_amc_as_documented() -> None:
    model = padded()
    before = copy.deepcopy(model.state_dict())
    config = [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8}]
    ddpg = {
        "hidden1": 8,
        "hidden2": 8,
        "lr_c": 1e-3,
        "lr_a": 1e-4,
        "warmup": 2,
        "bsize": 4,
        "tau": 0.01,
        "epsilon": 50000,
    }
    pruner = v2.AMCPruner(3, model, config, DUMMY, score, ddpg_params=ddpg, target="flops")
    pruner.compress()
    _, small, masks, value, _ = pruner.get_best_result()
    assert masks == {}
    assert value == pytest.approx(score(small))
    assert pruner.result.best.cost <= 0.5 * pruner.result.baseline.cost
    assert small.fc.out_features == 4
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    own = v2.TorchEvaluator(training_func, None, None, dummy_input=DUMMY, evaluating_func=score)
    v2.AMCPruner(2, model, config, own, ddpg_params=ddpg, target="params").compress()
    with pytest.raises(ConfigError, match="there is no 'hiden1'"):
        v2.AMCPruner(2, model, config, own, ddpg_params={"hiden1": 3})
    with pytest.raises(ConfigError, match="one of l1, l2, fpgm"):
        v2.AMCPruner(2, model, config, own, pruning_algorithm="level")


def test_net_adapt_and_sensitivity_of_1() -> None:
    config = [{"op_names": ["conv1", "conv2", "conv3"], "sparsity": 0.3}]
    tuned: list[int] = []
    model = padded()
    pruner = nni.NetAdaptPruner(
        model,
        config,
        short_term_fine_tuner=lambda model: tuned.append(sum(p.numel() for p in model.parameters())),
        evaluator=score,
        sparsity_per_iteration=0.15,
    )
    small = pruner.compress()
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) <= 0.7 * whole
    assert len(tuned) >= 4
    assert max(tuned) < whole
    assert pruner.get_best_result()[1] is small
    sensitivity = nni.SensitivityPruner(
        padded(), config, score, sparsity_per_iter=0.5, acc_drop_threshold=0.4
    )
    small = sensitivity.compress()
    assert sum(p.numel() for p in small.parameters()) <= 0.7 * whole
    with pytest.raises(ConfigError, match="positional inputs"):
        nni.NetAdaptPruner(padded(), config, finetuner, lambda model: 1.0)
    config = [{"op_names": ["conv1"], "sparsity": 0.3}, {"op_names": ["conv2"], "sparsity": 0.2}]
    with pytest.raises(ConfigError, match="one sparsity"):
        nni.NetAdaptPruner(padded(), config, finetuner, score)
    config = config[:1]
    with pytest.raises(ConfigError, match="optimize_mode"):
        nni.NetAdaptPruner(padded(), config, finetuner, score, "max")


def test_only_the_layers_of_the_config_are_cut() -> None:
    pruner = v2.AMCPruner(
        1, padded(), [{"op_names": ["conv1"], "sparsity": 0.2}], DUMMY, score, target="params"
    )
    names = [name for v in pruner._problem.space.variables for name, _ in v.info.parameter_dims]
    assert "conv1.weight" in names
    assert "conv3.weight" not in names
    assert not simulate.simulated_targets(pruner.bound_model)
    assert len(list(batches())) == 6
