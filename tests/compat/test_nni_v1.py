"""NNI 1.x: signatures, lottery tickets in the user's own loop, attention heads."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import DUMMY, padded, trainer, training_func
from dwindle.compat import nni
from dwindle.compat.nni import v1
from dwindle.config.errors import ConfigError
from pruning.models import Attention

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONV: list[dict[str, Any]] = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
CRITERION = nn.CrossEntropyLoss()

SIGNATURES = {
    "LevelPruner": "model config_list",
    "L1FilterPruner": "model config_list dependency_aware dummy_input",
    "L2FilterPruner": "model config_list dependency_aware dummy_input",
    "FPGMPruner": "model config_list dependency_aware dummy_input",
    "AGPPruner": "model config_list optimizer trainer criterion num_iterations epochs_per_iteration pruning_algorithm",
    "ADMMPruner": "model config_list trainer criterion num_iterations epochs_per_iteration row base_algo",
    "SlimPruner": "model config_list optimizer trainer criterion sparsifying_training_epochs scale dependency_aware "
    "dummy_input",
    "TaylorFOWeightFilterPruner": "model config_list optimizer trainer criterion sparsifying_training_batches "
    "dependency_aware dummy_input global_sort",
    "ActivationAPoZRankFilterPruner": "model config_list optimizer trainer criterion activation "
    "sparsifying_training_batches dependency_aware dummy_input",
    "LotteryTicketPruner": "model config_list optimizer lr_scheduler reset_weights",
    "NetAdaptPruner": "model config_list short_term_fine_tuner evaluator optimize_mode base_algo "
    "sparsity_per_iteration experiment_data_dir",
    "SensitivityPruner": "model config_list evaluator finetuner base_algo sparsity_proportion_calc sparsity_per_iter "
    "acc_drop_threshold checkpoint_dir",
    "TransformerHeadPruner": "model config_list head_hidden_dim attention_name_groups dummy_input ranking_criterion "
    "global_sort num_iterations epochs_per_iteration optimizer trainer criterion forward_runner algo_kwargs",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert list(inspect.signature(getattr(v1, name)).parameters) == SIGNATURES[name].split()


#: Every pruner of NNI 2.x and 3.0 that has a name of its own.
NAMES = [
    "LevelPruner",
    "L1NormPruner",
    "L2NormPruner",
    "FPGMPruner",
    "SlimPruner",
    "TaylorPruner",
    "MovementPruner",
    "LinearPruner",
    "AGPPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "TaylorFOWeightPruner",
    "ADMMPruner",
    "LotteryTicketPruner",
    "SimulatedAnnealingPruner",
    "AutoCompressPruner",
    "AMCPruner",
    "NetAdaptPruner",
    "SensitivityPruner",
    "TransformerHeadPruner",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert isinstance(getattr(nni, name), type)


def test_paths_of_2_and_1() -> None:
    from dwindle.compat.nni.algorithms.compression.pytorch import pruning as first
    from dwindle.compat.nni.algorithms.compression.v2.pytorch import pruning as second
    from dwindle.compat.nni.compression.pytorch import ModelSpeedup, TorchEvaluator, pruning, speedup

    assert first.L1FilterPruner is v1.L1FilterPruner
    assert second.AMCPruner is pruning.AMCPruner is nni.AMCPruner
    assert speedup.ModelSpeedup is ModelSpeedup is nni.ModelSpeedup
    assert TorchEvaluator is nni.v2.TorchEvaluator


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def epoch_trainer(model: nn.Module, optimizer: Any, criterion: Any, epoch: int | None) -> None:
    """The trainer of 1.x is told the epoch."""
    epochs.append(epoch)
    trainer(model, optimizer, criterion)


epochs: list[int | None] = []


@pytest.mark.parametrize(
    "make",
    [
        lambda m: v1.LevelPruner(m, CONV),
        lambda m: v1.L1FilterPruner(m, CONV, dependency_aware=True, dummy_input=DUMMY),
        lambda m: v1.L2FilterPruner(m, CONV),
        lambda m: v1.FPGMPruner(m, CONV),
        lambda m: v1.AGPPruner(m, CONV, sgd(m), epoch_trainer, CRITERION, 2, 1, "l1"),
        lambda m: v1.ADMMPruner(m, CONV, epoch_trainer, CRITERION, 2, 1),
        lambda m: v1.TaylorFOWeightFilterPruner(m, CONV, sgd(m), epoch_trainer, CRITERION, 2),
        lambda m: v1.ActivationAPoZRankFilterPruner(
            m, CONV, sgd(m), epoch_trainer, CRITERION, "relu", 2, True, DUMMY
        ),
        lambda m: v1.ActivationMeanRankFilterPruner(m, CONV, sgd(m), epoch_trainer, CRITERION),
    ],
)
def test_compress_returns_the_model_masked_exactly(make: Any) -> None:
    epochs.clear()
    model = padded()
    pruner = make(model)
    assert pruner.compress() is model
    masks = pruner.get_masks()
    for name in ("conv1", "conv2", "conv3"):
        assert float((masks[name]["weight"] == 0).double().mean()) == 0.5
    assert epochs == list(range(len(epochs)))


def test_slim() -> None:
    model = padded()
    config = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    pruner = v1.SlimPruner(model, config, sgd(model), epoch_trainer, CRITERION, sparsifying_training_epochs=1)
    pruner.compress()
    assert (
        sum(int((own["weight"] == 0).sum()) for name, own in pruner.get_masks().items() if "bn" in name) == 16
    )


def test_lottery_tickets_in_the_users_loop() -> None:
    model = padded()
    first = model.conv1.weight.detach().clone()
    optimizer = sgd(model)
    pruner = v1.LotteryTicketPruner(
        model, [{"prune_iterations": 3, "sparsity": 0.7, "op_types": ["Conv2d"]}], optimizer
    )
    assert pruner.compress() is model
    counts = []
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        masks = pruner.get_masks()
        mask = masks["conv1"]["weight"] if masks else torch.ones_like(first)
        counts.append(int((mask == 0).sum()))
        assert torch.equal(model.conv1.weight, first * mask)
        training_func(model, optimizer, CRITERION, max_epochs=1)
    assert counts == [int(216 * (1 - 0.3 ** (number / 3)) + 1e-9) for number in range(4)]
    with pytest.raises(ConfigError, match="all 3 rounds are done"):
        pruner.prune_iteration_start()
    with pytest.raises(ConfigError, match="prune_iterations"):
        v1.LotteryTicketPruner(model, [{"sparsity": 0.7, "op_types": ["Conv2d"]}])


TOKENS = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
HEADS: list[dict[str, Any]] = [
    {"sparsity": 0.5, "op_types": ["Linear"], "op_names": ["query", "key", "value"]}
]


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


def run(model: nn.Module) -> None:
    model.eval()
    for _ in range(2):
        model(TOKENS)


def heads_trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any, epoch: int | None
) -> None:
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(TOKENS), TOKENS).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "criterion", ["l1_weight", "l2_weight", "l1_activation", "l2_activation", "taylorfo"]
)
@pytest.mark.parametrize("iterations", [1, 2])
def test_transformer_heads(criterion: str, iterations: int) -> None:
    model = attention()
    before = model.up.weight.detach().clone()
    pruner = v1.TransformerHeadPruner(
        model,
        HEADS,
        head_hidden_dim=6,
        attention_name_groups=[["query", "key", "value", "out"]],
        dummy_input=TOKENS,
        ranking_criterion=criterion,
        num_iterations=iterations,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        trainer=heads_trainer,
        criterion=nn.functional.mse_loss,
        forward_runner=run,
    )
    assert pruner.compress() is model
    masks = pruner.get_masks()
    rows = masks["query"]["weight"].sum(1).reshape(4, 6) != 0
    assert rows.all(1).sum() == 2
    assert rows.any(1).sum() == 2
    for name in ("key", "value"):
        assert torch.equal(masks[name]["weight"].sum(1) != 0, rows.flatten())
    trained = iterations > 1
    assert torch.equal(model.up.weight, before) != trained  # gradients for a ranking leave no trace
    assert not any(module._forward_hooks for module in model.modules())


def test_errors() -> None:
    model = attention()
    for words, given in {
        "needs dummy_input": {},
        "needs forward_runner": {"dummy_input": TOKENS, "ranking_criterion": "l1_activation"},
        "needs optimizer, trainer": {"dummy_input": TOKENS, "ranking_criterion": "taylorfo"},
        "there is no module 'querry'": {"dummy_input": TOKENS, "attention_name_groups": [["querry"]]},
        "does not divide": {"dummy_input": TOKENS, "head_hidden_dim": 7},
        "unknown: more": {"dummy_input": TOKENS, "more": 1},
        "more than one iteration": {"dummy_input": TOKENS, "num_iterations": 2},
    }.items():
        with pytest.raises(ConfigError, match=words):
            v1.TransformerHeadPruner(model, HEADS, **{"head_hidden_dim": 6, **given})
