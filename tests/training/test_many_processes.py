"""Two processes: every compressor under DDP and fully_shard agrees bit for bit, and equals one process."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import ADMMPruner, MagnitudePruner, TaylorPruner, WandaPruner
from dwindle.training.averaging import GradientAveraging
from dwindle.training.processes import alike, join_over_processes, widest_range
from support.spread_runs import (
    EXAMPLE,
    METHODS,
    NAMES,
    STEPS,
    WEIGHTS,
    WRAPPINGS,
    Network,
    Spread,
    batches,
    cut_up,
    exit_codes,
    network,
    own_parameters,
    processes,
    trained,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

CLIP = 0.5
REALIZED = ("channels", "low rank", "fusion")

#: Under DDP these stand in tests/pruning/test_training_distributed.py.
ELSEWHERE = ("magnitude", "movement", "rb", "rigl", "slim", "sr-ste")
#: What is cut up inside the block: one of each kind of simulator and hook.
INSIDE = ("magnitude", "channels", "taylor gates", "movement", "lsq", "hint", "fusion")
COMBINATIONS = [
    (method, wrapping)
    for method in METHODS
    for wrapping in WRAPPINGS
    if not (wrapping.startswith("ddp") and method in ELSEWHERE)
    and (wrapping != "shards after" or method in INSIDE)
]


def small_outputs(spread: Spread) -> Tensor:
    """Make the really small model behind the run; return what it computes."""
    small = spread.run.realize(EXAMPLE)
    assert not simulate.has_shards(small.model)
    with torch.no_grad():
        outputs: Tensor = small.model.eval()(EXAMPLE)
    return torch.cat([outputs.flatten(), torch.tensor([float(small.parameters_after)])])


def integer_outputs(spread: Spread) -> Tensor:
    """Return what the integer model of a quantizer computes."""
    finished = spread.compressors[0].finish()
    with torch.no_grad():
        outputs: Tensor = finished(EXAMPLE)
    return outputs


def message_of(work: Callable[[], Any]) -> str:
    """Return what a ConfigError says; empty when there was none."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


def refused(make: Callable[[nn.Module], Any]) -> str:
    """Compress a model that is cut up; what is said, if the model is as before then."""
    model = network()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    cut_up(model)
    said = message_of(lambda: dw.compress(model, [make(model)]).__enter__())
    after = simulate.gathered(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], own) for name, own in before.items())
    return said


def pruned_before(wrapping: str) -> dict[str, Tensor]:
    """Masks of a pruner that cannot work on parts, made before; and training on."""
    model = network()
    pruner = WandaPruner(model, WEIGHTS, data=[EXAMPLE])
    pruner.compress()
    part = slice(None)
    if wrapping:
        cut_up(model)
        part = slice(4 * torch.distributed.get_rank(), 4 * torch.distributed.get_rank() + 4)
    optimizer = torch.optim.SGD(own_parameters(model), 0.1)
    with dw.compress(model, [pruner]) as run:
        for x, y in batches()[:2]:
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    return {name: own.clone() for name, own in simulate.gathered(model).state_dict().items()}


def cut_up_too_late() -> str:
    """``fully_shard`` inside the block, with a compressor that cannot work so: the weights are put back whole."""
    model = network()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    model.stem.weight.grad = None
    said = ""
    try:
        with dw.compress(model, [ADMMPruner(model, WEIGHTS, training_steps=4, interval_steps=2)]) as run:
            cut_up(model)
            optimizer = torch.optim.SGD(own_parameters(model), 0.1)
            functional.cross_entropy(model(EXAMPLE), batches()[0][1]).backward()
            optimizer.step()
            run.loss()
    except ConfigError as error:
        said = str(error)
    after = simulate.gathered(model).state_dict()
    assert all(torch.equal(after[name], own) for name, own in before.items())
    return said


def verbs_that_need_whole_weights(folder: str) -> list[str]:
    """Ask for what cannot be done with parts."""
    model = cut_up(network())
    verbs: list[Callable[[], Any]] = [
        lambda: dw.realize(model, EXAMPLE),
        lambda: dw.prune(model, (EXAMPLE,), ratio=0.5),
        lambda: dw.factorize(model, example_inputs=EXAMPLE, rank=2),
        lambda: dw.quantize(model, [EXAMPLE]),
        lambda: dw.quantize_weights(model, bits=4),
        lambda: dw.export(model, f"{folder}/model.onnx", EXAMPLE),
        lambda: dw.save(model, f"{folder}/saved"),
    ]
    return [message_of(verb) for verb in verbs]


def put_back(wrapping: str) -> str:
    """An exception in the block: weights are as before, and the model trains on."""
    spread = Spread(METHODS["movement"], wrapping)
    before = {name: own.clone() for name, own in network().state_dict().items()}
    try:
        with spread.run:
            spread.start()
            spread.step(0)
            raise KeyError("the user's own")
    except KeyError as error:
        said = str(error)
    after = simulate.gathered(spread.model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], own) for name, own in before.items())
    functional.cross_entropy((spread.wrapped or spread.model)(EXAMPLE), batches()[0][1]).backward()
    assert all(type(own).__name__ == "DTensor" for own in spread.model.parameters()) == ("shards" in wrapping)
    return said


def other_weights(number: int) -> str:
    """Each process has a model of its own."""
    model = network(seed=number)
    return message_of(lambda: dw.compress(model, [MagnitudePruner(model, WEIGHTS)]).__enter__())


def tensor_parallel() -> str:
    """A layer that is cut up in another way."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = network()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    parallelize_module(model.block, mesh, {"0": ColwiseParallel()})
    return message_of(lambda: simulate.attach_mask(model, Target("block.0", "weight"), torch.ones(13, 1)))


def exchanges(number: int) -> dict[str, Any]:
    """What the single functions give; each process brings its own number."""
    own = torch.tensor([1.0 + number, -5.0 * number])
    low, high = widest_range(own - 1, own + 1)
    broken = widest_range(own, torch.tensor([torch.nan if number else 0.0, 3.0]))[1]
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    weights += [nn.Parameter(torch.zeros(1))]
    averaging = GradientAveraging()
    averaging.follow(weights)
    factors = own.sum()  # 1 and -3
    for _ in range(2):  # accumulated: each pass adds (1 - 3) / 2 times its derivative
        loss = (weights[0] * torch.tensor([1.0, 2.0])).sum() * factors
        if number == 0:  # the other process has no gradient of this one
            loss = loss + weights[1].sum()
        loss.backward()  # type: ignore[no-untyped-call]
    averaging.stop()
    (weights[0].sum() * number).backward()
    return {
        "low": low,
        "high": high,
        "broken": broken,
        "joined": join_over_processes(torch.arange(2 * number + 1).reshape(-1, 1)),
        "alike": [alike([torch.ones(3), torch.ones((), dtype=torch.bool)]), alike([own])],
        "gradients": [own.grad for own in weights],
    }


def accelerated(number: int | None) -> dict[str, Tensor]:
    """Train with Accelerate, which prepares the model inside the block; alone with None."""
    from accelerate import Accelerator

    from dwindle.training.adapters import follow_accelerator

    model = network()
    optimizer = torch.optim.SGD(own_parameters(model), lr=0.2, momentum=0.5)
    part = slice(None) if number is None else slice(4 * number, 4 * number + 4)
    with dw.compress(model, METHODS["fusion"](model)) as run:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        followed = follow_accelerator(accelerator, run, optimizer)
        prepared, ready = accelerator.prepare(model, optimizer)
        for x, y in batches():
            with accelerator.accumulate(prepared):
                loss = functional.cross_entropy(prepared(x[part]), y[part]) + followed.loss()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                ready.step()
                ready.zero_grad()
                followed.step()
        own = {f"own {position}": own.detach().clone() for position, own in enumerate(run.parameters())}
    return own | {name: value.clone() for name, value in model.state_dict().items()}


def resumed_by_accelerate(number: int, folder: str) -> list[dict[str, Tensor]]:
    """An undisturbed training with Accelerate, and one from its checkpoint with what a pruner had seen."""
    from accelerate import Accelerator

    from dwindle.training.adapters import follow_accelerator

    found = []
    for first in (0, 2):
        model = network()
        optimizer = torch.optim.SGD(own_parameters(model), lr=0.2, momentum=0.5)
        with dw.compress(model, METHODS["taylor outputs"](model)) as run:
            accelerator = Accelerator(cpu=True)
            followed = follow_accelerator(accelerator, run, optimizer)
            prepared, ready = accelerator.prepare(model, optimizer)
            if first:
                accelerator.load_state(folder)
            for step, (x, y) in enumerate(batches()[first:], first):
                part = slice(4 * number, 4 * number + 4)
                accelerator.backward(functional.cross_entropy(prepared(x[part]), y[part]) + followed.loss())
                ready.step()
                ready.zero_grad()
                followed.step()
                if step == 1 and not first:
                    accelerator.save_state(folder)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


def worker(number: int, port: int, directory: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(number),
        WORLD_SIZE="2",
        LOCAL_RANK=str(number),
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", rank=number, world_size=2, timeout=timedelta(seconds=300))
    found: dict[str, Any] = {}

    def put(name: str, work: Callable[[], Any]) -> None:
        torch.manual_seed(100 + number)  # the processes' own generators differ
        try:
            found[name] = work()
        except Exception:
            found[name] = traceback.format_exc()

    try:
        for method, wrapping in COMBINATIONS:

            def run(wrapping: str = wrapping, method: str = method) -> Any:
                spread, seen = trained(METHODS[method], wrapping)
                if "shards" in wrapping and method in REALIZED:
                    seen["small"] = small_outputs(spread)
                if "shards" in wrapping and method == "lsq":
                    seen["integers"] = integer_outputs(spread)
                return seen

            put(f"{method}, {wrapping}", run)
        put("clipped", lambda: trained(METHODS["fusion"], "ddp before", clip=CLIP)[1])
        put(
            "admm",
            lambda: refused(lambda model: ADMMPruner(model, WEIGHTS, training_steps=4, interval_steps=2)),
        )
        put("wanda", lambda: refused(lambda model: WandaPruner(model, WEIGHTS, data=[EXAMPLE])))
        put("data", lambda: refused(lambda model: TaylorPruner(model, WEIGHTS, data=batches())))
        put("pruned before", lambda: pruned_before("shards"))
        put("verbs", lambda: verbs_that_need_whole_weights(directory))
        put("too late", cut_up_too_late)
        put("put back, ddp", lambda: put_back("ddp after"))
        put("put back, shards", lambda: put_back("shards before"))
        put("put back, shards inside", lambda: put_back("shards after"))
        put("other weights", lambda: other_weights(number))
        put("tensor parallel", tensor_parallel)
        put("exchanges", lambda: exchanges(number))
        put("accelerate", lambda: accelerated(number))
        put("resumed", lambda: resumed_by_accelerate(number, f"{directory}/checkpoint"))
        torch.save(found, Path(directory) / f"{number}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("spread")
    assert exit_codes(processes(worker, str(directory))) == [0, 0]
    return [torch.load(directory / f"{number}.pt") for number in range(2)]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Tensor]]:
    known: dict[str, dict[str, Tensor]] = {}

    def of(method: str) -> dict[str, Tensor]:
        if method not in known:
            spread, known[method] = trained(METHODS[method])
            if method in REALIZED:
                known[method]["small"] = small_outputs(spread)
            if method == "lsq":
                known[method]["integers"] = integer_outputs(spread)
        return known[method]

    return of


def check_same(both: list[Any], expected: dict[str, Tensor]) -> None:
    """Both processes have the same bits, and what one process has; masks to the bit."""
    first, second = both
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    for name, value in expected.items():
        if name in ("small", "integers") and name not in first:
            continue
        assert torch.equal(first[name], second[name]), name
        if name.startswith("mask"):
            assert torch.equal(first[name], value), name
        else:
            assert torch.allclose(first[name], value, rtol=1e-4, atol=2e-5), name
    assert set(first) - set(expected) == set()


@pytest.mark.parametrize(("method", "wrapping"), COMBINATIONS)
def test_two_processes_equal_one(
    method: str, wrapping: str, found: list[dict[str, Any]], alone: Callable[[str], dict[str, Tensor]]
) -> None:
    check_same([own[f"{method}, {wrapping}"] for own in found], alone(method))
    assert any(not torch.equal(value, alone(method)[name]) for name, value in network().state_dict().items())


def test_exchanges(found: list[dict[str, Any]]) -> None:
    for number, own in enumerate(found):
        seen = own["exchanges"]
        assert isinstance(seen, dict), seen
        assert seen["low"].tolist() == [0.0, -6.0]
        assert seen["high"].tolist() == [3.0, 1.0]
        assert seen["broken"].tolist() == [torch.inf, 3.0]
        assert seen["joined"].flatten().tolist() == [0, 0, 1, 2]
        assert seen["alike"] == [True, False]
        weights, half, unused = seen["gradients"]
        assert weights.tolist() == [-2.0 + number, -4.0 + number]  # and once alone, behind stop()
        assert half.tolist() == [1.0] * 3
        assert unused is None


def test_gradients_are_averaged_before_they_are_clipped(found: list[dict[str, Any]]) -> None:
    check_same([own["clipped"] for own in found], trained(METHODS["fusion"], clip=CLIP)[1])


def test_masks_that_were_made_before(found: list[dict[str, Any]]) -> None:
    alone = pruned_before("")
    check_same([own["pruned before"] for own in found], alone)
    assert int((alone["block.0.weight"] == 0).sum()) == 13 * 16 // 2


@pytest.mark.filterwarnings("ignore:MovementPruner")
def test_accelerate(found: list[dict[str, Any]]) -> None:
    pytest.importorskip("accelerate")
    check_same([own["accelerate"] for own in found], accelerated(None))


def test_accelerate_resumes_with_what_each_process_has_seen(
    found: list[dict[str, Any]], alone: Callable[[str], dict[str, Tensor]]
) -> None:
    pytest.importorskip("accelerate")
    for own in found:
        whole, again = own["resumed"]
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
        for name in NAMES:
            mask = alone("taylor outputs")[f"mask {name}.weight"]
            assert torch.equal(whole[f"{name}.weight"] == 0, mask == 0)


def test_verbs_say_that_they_need_whole_weights(found: list[dict[str, Any]]) -> None:
    names = ("realize", "prune", "factorize", "quantize", "quantize_weights", "export", "save")
    for own in found:
        assert isinstance(own["verbs"], list), own["verbs"]
        for name, said in zip(names, own["verbs"], strict=True):
            assert said.startswith(f"dw.{name} needs whole weights, but fully_shard has cut this model up"), (
                said
            )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("admm", "compressors[0] (ADMMPruner) cannot work on a model that fully_shard has cut up"),
        ("wanda", "compressors[0] (WandaPruner) cannot work"),
        ("data", "compress() before fully_shard, or watch training_steps="),
        ("too late", "compressors[0] (ADMMPruner) cannot work"),
        ("put back, ddp", "the user's own"),
        ("put back, shards", "the user's own"),
        ("put back, shards inside", "the user's own"),
        ("other weights", "the processes hold models with different weights"),
        ("tensor parallel", "the parameter 'weight' of a Linear is a DTensor"),
    ],
)
def test_what_cannot_be_is_said_everywhere_and_changes_nothing(
    name: str, part: str, found: list[dict[str, Any]]
) -> None:
    for own in found:
        assert part in own[name], own[name]
        assert "Traceback" not in own[name], own[name]


def test_the_runs_masked_and_quantized_something(alone: Callable[[str], dict[str, Tensor]]) -> None:
    for method in ("magnitude", "random", "taylor", "movement", "rb", "rigl", "fusion"):
        masks = [mask for name, mask in alone(method).items() if name.startswith("mask") and mask.dim() > 1]
        assert len(masks) == len(NAMES)
        assert sum(int(mask.sum()) for mask in masks) == sum(mask.numel() for mask in masks) // 2, method
    assert isinstance(network(), Network)
    assert len(batches()) == STEPS
