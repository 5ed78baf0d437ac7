"""NNI 2.x: both forms of its arguments, its documented examples, what its modes mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compat.nni_loops import DUMMY, batches, evaluate, finetuner, padded, trainer, training_func
from dwindle import simulate
from dwindle.compat import nni
from dwindle.compat.nni import ModelSpeedup, v2
from dwindle.config.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CRITERION = nn.CrossEntropyLoss()
CONV: list[dict[str, Any]] = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


def evaluator(model: nn.Module, rate: float = 0.01) -> v2.TorchEvaluator:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=rate, momentum=0.9)
    return v2.TorchEvaluator(training_func, optimizer, CRITERION, dummy_input=DUMMY, evaluating_func=evaluate)


def old(model: nn.Module) -> tuple[Any, ...]:
    return trainer, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9), CRITERION


def share(masks: Any, name: str) -> float:
    return float((masks[name]["weight"] == 0).double().mean())


@pytest.mark.parametrize("kind", [v2.L1NormPruner, v2.L2NormPruner, v2.FPGMPruner])
def test_norm_pruners_and_dependency_awareness(kind: Any) -> None:
    """The documented example; in the aware mode the two convolutions that are added lose the same channels."""
    _, masks = kind(padded(), CONV).compress()
    assert [share(masks, name) for name in ("conv1", "conv2", "conv3")] == [0.5] * 3
    pruner = kind(padded(), CONV, mode="dependency_aware", dummy_input=DUMMY)
    _, masks = pruner.compress()
    assert torch.equal(masks["conv2"]["bias"], masks["conv3"]["bias"])
    assert pruner.show_pruned_weights()["conv2"] == masks["conv2"]["bias"].nonzero().flatten().tolist()
    with pytest.raises(ConfigError, match="needs dummy_input"):
        kind(padded(), CONV, mode="dependency_aware")
    with pytest.raises(ConfigError, match="did you mean 'normal'"):
        kind(padded(), CONV, mode="normall")


@pytest.mark.parametrize("bank", [[4], [2, 2], [3, 1, 1]])
def test_level_in_balance_mode_takes_the_same_share_of_every_bank(bank: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4) if len(bank) == 3 else nn.Linear(8, 6))
    ratio = 1 / 3 if len(bank) == 3 else 0.5
    pruner = v2.LevelPruner(
        model, [{"sparsity": ratio, "op_types": ["default"]}], mode="balance", balance_gran=bank
    )
    _, masks = pruner.compress()
    mask = masks["0"]["weight"]
    weight = model._modules["0"]._parameters["weight"].detach()  # type: ignore[union-attr]
    full = (1,) * (mask.dim() - len(bank)) + tuple(bank)
    for corner in torch.cartesian_prod(
        *(torch.arange(0, s, b) for s, b in zip(mask.shape, full, strict=True))
    ):
        here = tuple(slice(int(c), int(c) + b) for c, b in zip(corner, full, strict=True))
        gone = mask[here].flatten() == 0
        assert int(gone.sum()) == round(gone.numel() * ratio)
        sizes = weight[here].abs().flatten()
        assert sizes[gone].max() < sizes[~gone].min()
    with pytest.raises(ConfigError, match="needs balance_gran"):
        v2.LevelPruner(model, CONV, mode="balance")


@pytest.mark.parametrize("kind", [v2.ActivationAPoZRankPruner, v2.ActivationMeanRankPruner])
def test_activation_pruners_in_both_forms(kind: Any) -> None:
    results = []
    for form in ("new", "old"):
        model = padded()
        if form == "new":
            pruner = kind(
                model,
                CONV,
                evaluator(model),
                5,
                activation="relu",
                mode="dependency_aware",
                dummy_input=DUMMY,
            )
        else:
            pruner = kind(
                model, CONV, *old(model), training_batches=5, mode="dependency_aware", dummy_input=DUMMY
            )
        _, masks = pruner.compress()
        results.append({name: own["weight"].clone() for name, own in masks.items() if "conv" in name})
        assert [share(masks, name) for name in ("conv1", "conv2", "conv3")] == [0.5] * 3
        pruner._unwrap_model()
        small = ModelSpeedup(model, dummy_input=DUMMY, masks_file=masks).speedup_model()
        assert (small.conv1.out_channels, small.conv3.out_channels) == (4, 6)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_taylor_in_its_modes() -> None:
    model = padded()
    _, masks = v2.TaylorFOWeightPruner(model, CONV, evaluator(model), training_steps=4).compress()
    assert share(masks, "conv1") == 0.5
    model = padded()
    config = [{"total_sparsity": 0.5, "op_types": ["Conv2d"], "max_sparsity_per_layer": 0.8}]
    pruner = v2.TaylorFOWeightPruner(model, config, *old(model), 4, mode="global")
    _, masks = pruner.compress()
    counts = [int((masks[name]["weight"] == 0).sum()) for name in ("conv1", "conv2", "conv3")]
    whole = [8 * 27, 12 * 72, 12 * 108]
    assert all(count <= 0.8 * size for count, size in zip(counts, whole, strict=True))
    assert 0 <= 0.5 * sum(whole) - sum(counts) < 108


def test_slim_prunes_the_scales_of_norms_as_in_2() -> None:
    """The documented example: BatchNorm2d, one ranking, at most 90 % of a layer; then speedup."""
    model = padded()
    config = [{"total_sparsity": 0.5, "op_types": ["BatchNorm2d"], "max_sparsity_per_layer": 0.9}]
    pruner = v2.SlimPruner(model, config, *old(model), training_epochs=2, scale=0.01, mode="global")
    _, masks = pruner.compress()
    gone = [int((masks[name]["weight"] == 0).sum()) for name in ("bn1", "bn2", "bn3")]
    assert sum(gone) == 16
    scales = torch.cat(
        [model._modules[n]._parameters["weight"].detach().abs() for n in ("bn1", "bn2", "bn3")]
    )  # type: ignore[union-attr]
    flags = torch.cat([masks[name]["weight"] == 0 for name in ("bn1", "bn2", "bn3")])
    assert scales[flags].max() <= scales[~flags].min()
    pruner._unwrap_model()
    small = ModelSpeedup(model, dummy_input=DUMMY, masks_file=masks).speedup_model()
    assert small.conv1.out_channels == 8 - gone[0]


@pytest.mark.parametrize("form", ["new", "old"])
def test_admm(form: str) -> None:
    model = padded()
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"], "rho": 0.5}]
    if form == "new":
        pruner = v2.ADMMPruner(model, config, evaluator(model), iterations=3, training_epochs=1)
        expected = [108, 432, 648]
    else:
        pruner = v2.ADMMPruner(
            model, config, *old(model), iterations=3, training_epochs=1, granularity="coarse-grained"
        )
        expected = [4, 6, 6]
    assert set(pruner.inner.rho.values()) == {0.5}  # type: ignore[union-attr]
    before = copy.deepcopy(model.conv2.weight.detach())
    _, masks = pruner.compress()
    found = [masks[name]["weight"] == 0 for name in ("conv1", "conv2", "conv3")]
    assert [int(m.sum() if form == "new" else m.flatten(1).all(1).sum()) for m in found] == expected
    dense = model._modules["conv2"]._parameters["weight"].detach()  # type: ignore[union-attr]
    shrunk, grown = dense[found[1]].abs().sum(), before[found[1]].abs().sum()
    assert shrunk < 0.95 * grown  # the penalty pulled what goes towards zero


def test_movement_in_its_modes() -> None:
    config = [{"op_types": ["Linear", "Conv2d"], "op_partial_names": ["conv", "fc"], "sparsity": 0.5}]
    model = padded()
    _, masks = v2.MovementPruner(
        model, config, evaluator(model), warm_up_step=2, cool_down_beginning_step=8, training_steps=12
    ).compress()
    assert share(masks, "fc") == share(masks, "conv2") == 0.5
    model = padded()
    pruner = v2.MovementPruner(
        model, config, *old(model), training_epochs=2, warm_up_step=2, cool_down_beginning_step=8
    )
    _, masks = pruner.compress()
    assert share(masks, "conv3") == 0.5
    model = padded()
    soft = v2.MovementPruner(
        model,
        config,
        evaluator(model),
        1,
        6,
        training_epochs=2,
        regular_scale=10,
        movement_mode="soft",
    )
    assert {own.setting.sparse_threshold for own in soft.inner.plan.goals.values()} == {0.5}  # type: ignore[union-attr]
    soft.compress()
    with pytest.raises(ConfigError, match="before cool_down_beginning_step"):
        v2.MovementPruner(model := padded(), config, evaluator(model), 1, 90, training_epochs=1).compress()
    assert not simulate.simulated_targets(model)


def test_movement_finds_blocks_of_a_transformer() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
        )
    )
    config = [{"op_types": ["Linear"], "op_partial_names": ["encoder"], "sparsity": 0.5}]
    own = v2.TorchEvaluator(training_func, torch.optim.SGD(bert.parameters(), lr=0.1), CRITERION)
    pruner = v2.MovementPruner(bert, config, own, 1, 3, training_steps=4, sparse_granularity="auto")
    kinds = {
        ".".join(target.module.split(".")[-2:]): goal.granularity
        for target, goal in pruner.inner.plan.goals.items()  # type: ignore[union-attr]
    }
    assert kinds["self.query"].block_shape((16, 16)) == (4, 4)
    assert kinds["intermediate.dense"].block_shape((24, 16))[0] == 24


ALGORITHMS = ["level", "l1", "l2", "fpgm", "slim", "apoz", "mean_activation", "taylorfo", "admm"]
PARAMETERS = {
    "slim": {"training_epochs": 1},
    "apoz": {"training_steps": 3, "dummy_input": DUMMY, "mode": "dependency_aware"},
    "mean_activation": {"training_steps": 3},
    "taylorfo": {"training_steps": 3},
    "admm": {"iterations": 2, "training_epochs": 1},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_iterative_pruners_with_every_algorithm(name: str) -> None:
    model = padded()
    config = [{"sparsity": 0.5, "op_types": ["BatchNorm2d" if name == "slim" else "Conv2d"]}]
    pruner = v2.AGPPruner(
        model, config, name, 2, evaluator=evaluator(model), pruning_params=PARAMETERS.get(name, {})
    )
    pruner.compress()
    _, best, masks, score, _ = pruner.get_best_result()
    assert best is model
    assert isinstance(score, float)
    names = ("bn1", "bn2", "bn3") if name == "slim" else ("conv1", "conv2", "conv3")
    whole = sum(masks[own]["weight"].numel() for own in names)
    gone = sum(int((masks[own]["weight"] == 0).sum()) for own in names)
    assert gone == whole // 2


@pytest.mark.parametrize("kind", [v2.LinearPruner, v2.AGPPruner, v2.LotteryTicketPruner])
@pytest.mark.parametrize("speedup", [False, True])
def test_iterative_pruners_as_documented(kind: Any, speedup: bool, tmp_path: Any) -> None:
    model = padded()
    first = model.conv1.weight.detach().clone()
    given: dict[str, Any] = {"evaluator": None, "finetuner": finetuner}
    if speedup:
        given |= {"speedup": True, "dummy_input": DUMMY}
    if kind is v2.LotteryTicketPruner:
        given["reset_weight"] = True
        given["finetuner"] = finetuner if speedup else (lambda model: None)
    config = [{"op_names": ["conv1"], "sparsity": 0.5}]
    pruner = kind(
        model,
        config,
        pruning_algorithm="l1",
        total_iteration=3,
        log_dir=str(tmp_path),
        keep_intermediate_result=True,
        **given,
    )
    pruner.compress()
    _, best, masks, score, _ = pruner.get_best_result()
    assert score is None
    assert (best.conv1.out_channels == 4) if speedup else (share(masks, "conv1") == 0.5)
    assert (tmp_path / "2" / "masks.pth").exists()
    if kind is v2.LotteryTicketPruner and not speedup:
        assert torch.equal(best.conv1.weight, first * masks["conv1"]["weight"])
    evaluate(best)


def test_exported_files_and_errors(tmp_path: Any) -> None:
    model = padded()
    pruner = v2.L1NormPruner(model, CONV)
    _, masks = pruner.compress()
    pruner.export_model(str(tmp_path / "model.pth"), str(tmp_path / "mask.pth"))
    plain = padded()
    plain.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert torch.equal(plain.conv1.weight, model.conv1.weight)
    assert torch.load(tmp_path / "mask.pth", weights_only=True).keys() == masks.keys()
    model = padded()
    for words, make in {
        "missing: training_steps": lambda: v2.TaylorFOWeightPruner(model, CONV, evaluator(model)),
        "no argument 'steps'": lambda: v2.TaylorFOWeightPruner(model, CONV, evaluator(model), steps=3),
        "given twice": lambda: v2.TaylorFOWeightPruner(model, CONV, evaluator(model), 3, training_steps=3),
        "arguments, but there are": lambda: v2.TaylorFOWeightPruner(
            model, CONV, evaluator(model), 3, "normal", DUMMY, 9
        ),
        "did you mean 'l1'": lambda: v2.AGPPruner(model, CONV, "l11", 2),
        "needs dummy_input": lambda: v2.AGPPruner(model, CONV, "l1", 2, speedup=True).compress(),
        "call compress": lambda: v2.AGPPruner(model, CONV, "l1", 2).get_best_result(),
        "activation 'tanh'": lambda: v2.ActivationAPoZRankPruner(model, CONV, evaluator(model), 3, "tanh"),
        "granularity 'fine'": lambda: v2.ADMMPruner(model, CONV, evaluator(model), 1, 1, "fine"),
        "movement_mode 'firm'": lambda: v2.MovementPruner(
            model, CONV, evaluator(model), 1, 2, training_steps=3, movement_mode="firm"
        ),
    }.items():
        with pytest.raises(ConfigError, match=words):
            make()
    assert not simulate.simulated_targets(model)
    assert len(list(batches())) == 6
