"""Watching the model at work: what is counted, what is left alone, what fails before anything changed, resuming."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.pruning import ActivationMeanRankPruner, ObservingPruner, TaylorPruner
from dwindle.pruning.statistics import Statistics
from dwindle.training import compress

CONFIG = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
FIRST = Target("0", "weight")
Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def plain_network() -> nn.Sequential:
    """Nothing in it depends on how samples are divided into batches."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def train(
    model: nn.Module, pruner: ObservingPruner, data: list[Batch], accumulate: int = 1, rate: float = 0.1
) -> None:
    """Train as a user does, with a step of the optimizer after every ``accumulate`` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    with compress(model, [pruner]) as run:
        for number, (x, y) in enumerate(data, 1):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                run.step()


def state_of(model: nn.Module) -> dict[str, Any]:
    parameters = {
        name: (own, own.detach().clone(), own.requires_grad) for name, own in model.named_parameters()
    }
    buffers = {name: (own, own.clone()) for name, own in model.named_buffers()}
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return {"parameters": parameters, "buffers": buffers, "flags": flags, "hooks": hooks}


def check_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    for kind in ("parameters", "buffers"):
        assert list(now[kind]) == list(before[kind])
        for name, (own, value, *rest) in before[kind].items():
            assert now[kind][name][0] is own
            assert torch.equal(now[kind][name][1], value)
            assert list(now[kind][name][2:]) == rest
    assert now["flags"] == before["flags"]
    assert now["hooks"] == before["hooks"]
    assert not simulate.simulated_targets(model)


class Broken(ObservingPruner):
    """Statistics that fail in the middle of the data."""

    needs_gradients = True

    def gradients(self) -> None:
        self.add(FIRST, torch.ones(8))
        if self.batches_seen == 1:
            raise DwindleError("broken")

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        return self.mean(target)


@pytest.mark.parametrize("kind", ["data", "failure"])
def test_the_model_is_as_it_was_after_the_own_pass(kind: str) -> None:
    model = network().train()
    model[4].eval()
    model[4].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = state_of(model)
    random = torch.random.get_rng_state()
    if kind == "failure":
        with pytest.raises(DwindleError, match="broken"):
            Broken(model, CONFIG, data=batches(3)).compress()
    else:
        pruner = TaylorPruner(model, CONFIG, data=batches(3))
        pruner.prepare()
        assert pruner.batches_seen == 3
    check_untouched(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))


def test_a_frozen_layer_can_be_ranked() -> None:
    frozen, free = plain_network().requires_grad_(False), plain_network()
    masks = [TaylorPruner(model, CONFIG, data=batches(2)).compress()[1] for model in (frozen, free)]
    assert torch.equal(masks[0]["0"]["weight"], masks[1]["0"]["weight"])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (batches(2), {"batches": 3}, "data ended after 2 of 3 batches"),
        ([], {}, "data ended after 0 of its batches"),
        (iter(batches(2)), {"batches": 3}, "data ended after 2 of 3 batches"),
        (3, {}, "not an iterable"),
        (batches(2), {"batches": 0}, "batches: 0"),
        (batches(2), {"training_steps": 2}, "not both"),
        (None, {}, "needs data="),
    ],
)
def test_mistakes_are_told_before_anything_changes(data: Any, options: dict[str, Any], words: str) -> None:
    model = network().train()
    before = state_of(model)
    with pytest.raises(ConfigError, match=words):
        TaylorPruner(model, CONFIG, data=data, **options).compress()
    check_untouched(model, before)


@pytest.mark.parametrize("kind", [TaylorPruner, ActivationMeanRankPruner])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite(kind: type[ObservingPruner], bad: float) -> None:
    data = batches(3)
    data[1][0][2, 3] = bad
    model = network()
    before = state_of(model)
    options = {"activation": "relu"} if kind is ActivationMeanRankPruner else {}
    with pytest.raises(DwindleError, match=r"the loss of batch 2 is nan|not finite"):
        kind(model, CONFIG, data=data, **options).compress()
    check_untouched(model, before)


def test_weights_that_are_not_finite_do_not_hide_behind_a_count() -> None:
    """A count of zeros is finite whatever the values are."""
    from dwindle.pruning import ActivationAPoZRankPruner

    model = plain_network()
    with torch.no_grad():
        model[0].weight[2, 1] = float("nan")
    with pytest.raises(DwindleError, match="not finite"):
        ActivationAPoZRankPruner(model, CONFIG, data=batches(2), activation="relu").compress()


def test_an_iterator_that_is_used_up_leaves_the_masks() -> None:
    model = plain_network()
    pruner = TaylorPruner(model, CONFIG, data=iter(batches(2)))
    _, masks = pruner.compress(0.5)
    before = masks["0"]["weight"].clone()
    with pytest.raises(ConfigError, match="only once"):
        pruner.update(1.0)
    assert torch.equal(pruner.masks["0"]["weight"], before)


def test_statistics_do_not_depend_on_how_samples_are_divided() -> None:
    x = torch.cat([x for x, _ in batches(3)])
    means = []
    for parts in ([x], list(x.split(5)), list(x.split(1))):
        pruner = ActivationMeanRankPruner(plain_network(), CONFIG, data=parts, activation="gelu")
        pruner.prepare()
        means.append(pruner.mean(Target("0", "_output_0")))
    torch.testing.assert_close(means[1], means[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(means[2], means[0], rtol=1e-12, atol=1e-12)


def test_accumulated_gradients_are_one_gradient() -> None:
    """NNI squares what every backward pass gives; then accumulation would change the metric."""
    whole = batches(4)
    parts = [(x[half], y[half]) for x, y in whole for half in (slice(0, 2), slice(2, 4))]
    means = []
    for data, accumulate in ((whole, 1), (parts, 2)):
        model = plain_network()
        pruner = TaylorPruner(model, CONFIG, training_steps=4)
        train(model, pruner, data, accumulate)
        means.append(pruner.mean(FIRST))
        assert pruner.statistics.counts[FIRST] == 4
    torch.testing.assert_close(means[1], means[0], rtol=1e-10, atol=0)


def test_an_evaluation_between_steps_does_not_count() -> None:
    def run(evaluate: bool) -> Statistics:
        model = plain_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = ActivationMeanRankPruner(model, CONFIG, training_steps=9, activation="relu")
        with compress(model, [pruner]) as run:
            for x, y in batches(3):
                model.train()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                if evaluate:
                    model.eval()
                    model(x * 100)
            return copy.deepcopy(pruner.statistics)

    ours, plain = run(True), run(False)
    place = Target("0", "_output_0")
    assert ours.counts == plain.counts == {place: 12}
    assert torch.equal(ours.sums[place], plain.sums[place])


def test_each_optimizer_brings_its_own_gradients() -> None:
    """With an optimizer for each layer the first layer's gradient counts once a step."""
    model = plain_network()
    config = [{"op_names": ["0", "2"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    optimizers = [torch.optim.SGD(model[number].parameters(), lr=0.0) for number in (0, 2)]
    stranger = nn.Linear(2, 2)
    optimizers.append(torch.optim.SGD(stranger.parameters(), lr=0.1))
    stranger(torch.ones(1, 2)).sum().backward()
    pruner = TaylorPruner(model, config, training_steps=9)
    model.train()
    with compress(model, [pruner]) as run:
        for x, y in batches(3):
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.step()
        assert pruner.statistics.counts == {FIRST: 3, Target("2", "weight"): 3}


def test_masks_come_after_the_steps_and_the_hooks_go() -> None:
    model = plain_network()
    pruner = ActivationMeanRankPruner(model, CONFIG, training_steps=2, activation="relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    seen = []
    with compress(model, [pruner]) as run:
        for x, y in batches(4):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            seen.append((bool(pruner.masks), len(model[0]._forward_hooks)))
    assert seen == [(False, 1), (True, 0), (True, 0), (True, 0)]
    assert int((model[0].weight == 0).all(1).sum()) == 4


def steps(model: nn.Module, run: Any, data: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    for x, y in data:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("early", [False, True], ids=["loaded inside", "loaded before"])
@pytest.mark.parametrize("on", ["weights", "gates"])
def test_a_resumed_run_finds_the_same_masks(stop: int, early: bool, on: str) -> None:
    def fresh() -> tuple[nn.Module, TaylorPruner, torch.optim.Optimizer]:
        model = plain_network().train()
        options: dict[str, Any] = {"training_steps": 4, "on": on}
        return model, TaylorPruner(model, CONFIG, **options), torch.optim.SGD(model.parameters(), lr=0.1)

    data = batches(6)
    model, pruner, optimizer = fresh()
    with compress(model, [pruner]) as run:
        steps(model, run, data, optimizer)
        expected = pruner.masks["0"]["weight"].clone()
    first, pruner, optimizer = fresh()
    with compress(first, [pruner]) as run:
        steps(first, run, data[:stop], optimizer)
        saved = copy.deepcopy((run.state_dict(), first.state_dict(), optimizer.state_dict()))
    second, pruner, optimizer = fresh()
    if early:
        pruner.load_state_dict(saved[0]["compressors"][0]["state"])
    with compress(second, [pruner]) as run:
        if not early:
            run.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        steps(second, run, data[stop:], optimizer)
        assert pruner.steps == 4
        assert torch.equal(pruner.masks["0"]["weight"], expected)
    for name, value in model.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_after_a_detach_it_goes_on_watching() -> None:
    model = plain_network().train()
    pruner = TaylorPruner(model, CONFIG, training_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = batches(4)
    for part in (data[:2], data[2:]):
        with compress(model, [pruner]) as run:
            steps(model, run, part, optimizer)
    alone = TaylorPruner(plain_network(), CONFIG, data=batches(4))
    _, masks = alone.compress()
    torch.testing.assert_close(pruner.mean(FIRST), alone.mean(FIRST), rtol=1e-12, atol=0)
    assert torch.equal((model[0].weight == 0).all(1), (masks["0"]["weight"] == 0).all(1))


def test_an_update_forgets_what_the_last_masks_were_made_of() -> None:
    """As a schedule does it: watched from the start, masks renewed from what came since."""
    model = plain_network().train()
    pruner = TaylorPruner(model, CONFIG)
    pruner.compress(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = batches(5)
    counts = []
    for number, (x, y) in enumerate(data, 1):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        if number in (2, 5):
            pruner.update(number / 5)
            counts.append(pruner.statistics.counts[FIRST])
    assert counts == [2, 3]
    before = pruner.masks["0"]["weight"].clone()
    pruner.update(1.0)  # nothing new was seen: the same statistics again
    assert torch.equal(pruner.masks["0"]["weight"], before)
    pruner.stop_watching()
    pruner.detach()
    pruner.attach()  # the same masks, and nothing is watched any more
    assert torch.equal(pruner.masks["0"]["weight"], before)
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    assert pruner.statistics.counts[FIRST] == 3
    pruner.detach()


def test_data_are_run_over_again_at_each_update() -> None:
    model = plain_network()
    pruner = TaylorPruner(model, CONFIG, data=batches(2))
    pruner.compress(0.0)
    old = pruner.mean(FIRST)
    with torch.no_grad():
        next(model.parameters()).mul_(torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None])
    fresh = TaylorPruner(copy.deepcopy(simulate.detach(model)), CONFIG, data=batches(2))
    _, masks = fresh.compress()
    pruner.update(1.0)
    assert not torch.allclose(pruner.mean(FIRST), old)
    assert torch.equal(pruner.mean(FIRST), fresh.mean(FIRST))
    assert torch.equal(pruner.masks["0"]["weight"], masks["0"]["weight"])


def test_a_module_that_is_never_called() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Forked().double()
    before = state_of(model)
    with pytest.raises(DwindleError, match=r"idle.*saw nothing of it in 2 batches"):
        TaylorPruner(model, [{"op_names": ["idle"], "sparse_ratio": 0.5}], data=batches(2)).compress()
    check_untouched(model, before)


@pytest.mark.parametrize("on", ["weights", "gates", "outputs", None])
def test_no_batch_is_kept(on: Any) -> None:
    """When a batch is asked for, at most the one before it is still alive, and none of its activations."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    model = plain_network()
    model[0].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))

    def loader() -> Iterator[Batch]:
        for x, y in batches(6):
            fresh = x.clone()
            alive.append(weakref.ref(fresh))
            gc.collect()
            counts.append(sum(own() is not None for own in alive))
            yield fresh, y
            del fresh

    example = (torch.ones(2, 6, dtype=torch.float64),)
    if on is None:
        ActivationMeanRankPruner(model, CONFIG, example, data=loader()).compress()
    else:
        TaylorPruner(model, CONFIG, example, data=loader(), on=on).compress()
    assert len(counts) == 6
    assert max(counts) <= 2


def test_statistics_are_weighted_means() -> None:
    statistics = Statistics()
    statistics.add(FIRST, torch.tensor([2.0, 4.0]), 2)
    statistics.add(FIRST, torch.tensor([7.0, 5.0], dtype=torch.float16))
    assert statistics.mean(FIRST).tolist() == [3.0, 3.0]
    assert statistics.sums[FIRST].dtype == torch.float32
    with pytest.raises(DwindleError, match="shape"):
        statistics.add(FIRST, torch.ones(3))
    other = Statistics()
    other.load_state_dict(statistics.state_dict(), torch.device("cpu"))
    statistics.add(FIRST, torch.ones(2))
    assert other.mean(FIRST).tolist() == [3.0, 3.0]
    with pytest.raises(ConfigError, match="count for each sum"):
        other.load_state_dict({"sums": {"a.weight": torch.ones(1)}, "counts": {}}, torch.device("cpu"))
