"""The contract of steps, and that leaving the block is exact."""

import copy

import pytest
import torch
from torch import nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError, RealizeError
from dwindle.distillation import Distiller
from dwindle.training import CompressionRun, compress, fit, register_realizer
from dwindle.training import run as run_module


class Scaler:
    """A compressor that multiplies a weight by its own parameter while it is attached."""

    def __init__(self, model: nn.Module, fail: str = ""):
        self.model, self.fail = model, fail
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[str] = []
        self.handle = None

    def attach(self) -> None:
        if self.fail == "attach":
            with torch.no_grad():
                next(self.model.parameters()).zero_()
            raise RuntimeError("no attaching")
        self.handle = self.model.register_forward_hook(lambda module, args, output: output * self.scale)
        self.seen.append("attach")

    def detach(self) -> None:
        self.seen.append("detach")
        if self.handle is not None:
            self.handle.remove()

    def step(self) -> None:
        self.seen.append("step")

    def loss(self) -> torch.Tensor:
        return self.scale**2

    def parameters(self):
        yield self.scale

    def state_dict(self) -> dict:
        return {"scale": self.scale.detach()}

    def load_state_dict(self, state: dict) -> None:
        self.scale.data.copy_(state["scale"])


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_a_loop_of_the_user_with_two_compressors():
    model = make()
    parameters = list(model.parameters())
    teacher = copy.deepcopy(model)
    scaler, distiller = Scaler(model), Distiller(model, teacher=teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with compress(model, [scaler, distiller]) as run:
        assert run.add_parameters_to(optimizer, lr=0.5) == 1
        assert run.add_parameters_to(optimizer) == 0
        assert optimizer.param_groups[1]["lr"] == 0.5
        for _ in range(3):
            task = nn.functional.cross_entropy(model(x), y)
            added = run.loss()
            assert added.dim() == 0
            assert float(added.detach()) > float(scaler.loss().detach())
            (task + added).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert scaler.seen == ["attach", "step", "step", "step", "detach"]
    assert run.steps == distiller.steps == 3
    assert scaler.scale.item() != 2.0
    assert hooks_of(model) == 0
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]


def test_without_a_loss_the_run_adds_nothing():
    with compress(make(), []) as run:
        assert run.loss() == 0.0
        assert list(run.parameters()) == []


@pytest.mark.parametrize("where", ["attach", "body"])
def test_an_exception_leaves_the_model_as_it_was(where):
    model = make()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    first, second = Scaler(model), Scaler(model, fail="attach" if where == "attach" else "")

    def change_everything() -> None:
        with compress(model, [first, second]):
            model.train()
            model(torch.randn(8, 4))
            model.requires_grad_(True)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            raise RuntimeError("no body")

    with pytest.raises(RuntimeError, match=f"no {where}"):
        change_everything()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert hooks_of(model) == 0
    assert [module.training for module in model] == [True, False, True]
    assert not model[0].weight.requires_grad
    assert first.seen == ["attach", "detach"]


def test_values_stay_after_an_exception_when_asked_for():
    model = make()

    def interrupted() -> None:
        with compress(model, [Scaler(model)], restore_on_error=False):
            model[0].weight.data.fill_(7.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.all(model[0].weight == 7.0)
    assert hooks_of(model) == 0


def test_state_round_trip_and_other_compressors_are_refused():
    model = make()
    scaler = Scaler(model)
    with compress(model, [scaler]) as run:
        run.step()
        scaler.scale.data.fill_(5.0)
        state = run.state_dict()
    other = Scaler(model)
    with compress(model, [other]) as run:
        run.load_state_dict(state)
        assert run.steps == 1
    assert float(other.scale) == 5.0
    with compress(model, []) as run, pytest.raises(ConfigError, match="Scaler"):
        run.load_state_dict(state)


def test_fit_trains_compressors_and_resumes(tmp_path):
    x, y = torch.randn(32, 4), torch.arange(32) % 3

    def trained(epochs_each: list[int], name: str) -> tuple[nn.Module, Scaler]:
        for epochs in epochs_each:
            torch.manual_seed(1)
            model = make()
            teacher = copy.deepcopy(model)
            scaler = Scaler(model)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            fit(
                model, [(x, y)] * 3, optimizer, epochs=epochs, checkpoint=tmp_path / name,
                compressors=[scaler, Distiller(model, teacher=teacher)],
            )  # fmt: skip
        return model, scaler

    whole, whole_scaler = trained([4], "whole")
    parts, parts_scaler = trained([1, 3, 4], "parts")
    assert torch.equal(whole_scaler.scale, parts_scaler.scale)
    assert float(whole_scaler.scale) != 2.0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


class Masker:
    """A compressor that masks half of a weight and leaves taking off to the run."""

    def __init__(self, model: nn.Module):
        self.model = model

    def compress(self) -> None:
        mask = torch.ones(5, 4)
        mask[::2] = 0
        simulate.attach_mask(self.model, Target("0", "weight"), mask)

    def step(self) -> None:
        pass

    def loss(self) -> float:
        return 0.0

    def parameters(self):
        return iter(())

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_masks_are_on_inside_the_block_and_their_zeros_stay(monkeypatch):
    model = make()
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masker = Masker(model)
    with compress(model, [masker]) as run:
        assert int((model[0].weight == 0).sum()) == 12
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        run.step()
    assert model[0].weight is weight
    assert int((weight == 0).sum()) == 12
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == list(make().state_dict())
    given = {}
    monkeypatch.setattr(run_module, "_realizer", lambda model, **options: given.update(options))
    run.realize(example_inputs=(torch.randn(1, 4),))
    assert int(given["masks"]["0"]["weight"].sum()) == 8


def test_an_exception_takes_new_masks_off_and_leaves_old_ones_on():
    model = make()
    simulate.attach_mask(model, Target("2", "weight"), torch.eye(3, 5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def change_masks() -> None:
        with compress(model, [Masker(model)]):
            simulate.set_mask(model, Target("2", "weight"), torch.ones(3, 5))
            simulate.detach(model, keep_values=True)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        change_masks()
    assert list(simulate.get_masks(model)) == [Target("2", "weight")]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_masks_of_nobody_in_the_run_are_left_alone():
    model = make()
    simulate.attach_mask(model, Target("2", "weight"), torch.eye(3, 5))
    distiller = Distiller(model, teacher=make())
    fit(model, [(torch.randn(8, 4), torch.arange(8) % 3)], torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=1, compressors=[distiller])  # fmt: skip
    assert list(simulate.get_masks(model)) == [Target("2", "weight")]


def test_what_is_no_compressor_is_refused_by_name():
    model = make()
    with pytest.raises(ConfigError, match=r"compressors\[1\] is a Linear.*step\(\)"):
        compress(model, [Scaler(model), nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match="another model"):
        compress(model, [Scaler(make())])
    scaler = Scaler(model)
    with pytest.raises(ConfigError, match="listed twice"):
        compress(model, [scaler, scaler])
    run = compress(model, [])
    with pytest.raises(DwindleError, match="inside the block"):
        run.step()


def test_realize_goes_to_the_registered_function(monkeypatch):
    model = make()
    monkeypatch.setattr(run_module, "_realizer", None)
    run: CompressionRun = compress(model, [])
    with pytest.raises(RealizeError, match="needs the package dwindle"):
        run.realize(example_inputs=(torch.randn(1, 4),))
    calls = []
    register_realizer(lambda model, **options: calls.append((model, options)) or "small")
    assert run.realize(example_inputs=(1,), optimizer=None) == "small"
    assert calls == [(model, {"example_inputs": (1,), "optimizer": None})]
