"""The distiller inside a user's loop: right numbers, untouched teacher, no trace left behind."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.distillation import Distiller, FeatureLink, divergence
from dwindle.training import LinearSchedule, compress
from dwindle.zoo import residual_network


def pair() -> tuple[nn.Module, nn.Module]:
    return residual_network((16, 16), (1, 1), classes=5), residual_network((16, 16), (1, 1), classes=5)


def linked(distiller: Distiller, *links: FeatureLink) -> Distiller:
    """The same distiller with these links (what a config_list would give)."""
    other = copy.copy(distiller)
    other._link(links, None)
    return other


def state_of(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_loss_is_the_formula_and_the_teacher_is_untouched():
    model, teacher = pair()
    teacher.train()
    teacher.stages[0].eval()
    flags = [module.training for module in teacher.modules()]
    before = state_of(teacher)
    x = torch.randn(6, 1, 8, 8)
    distiller = Distiller(model, teacher=teacher, temperature=3.0, logits_weight=0.7)
    with compress(model, [distiller]) as run:
        outputs = model(x)
        loss = run.loss()
        loss.backward()
    reference = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        expected = 0.7 * divergence(outputs, reference(x), 3.0)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert [module.training for module in teacher.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    for network in (model, teacher):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())


def test_the_user_loop_random_stream_is_not_disturbed():
    model, teacher = pair()
    teacher = nn.Sequential(teacher, nn.Dropout(0.5))
    with compress(model, [Distiller(model, teacher=teacher)]) as run:
        torch.manual_seed(4)
        model(torch.ones(2, 1, 8, 8))
        run.loss()
        after = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(3))


def test_schedules_move_with_steps():
    model, teacher = pair()
    distiller = Distiller(
        model, teacher=teacher, temperature=LinearSchedule(4.0, 1.0, steps=2), logits_weight=1.0
    )
    x = torch.randn(4, 1, 8, 8)
    target = copy.deepcopy(teacher).eval()(x).detach()
    with compress(model, [distiller]) as run:
        for temperature in (4.0, 2.5, 1.0):
            outputs = model(x)
            assert float(run.loss().detach()) == pytest.approx(
                float(divergence(outputs.detach(), target, temperature)), rel=1e-6
            )
            run.step()
        state = distiller.state_dict()
    other = Distiller(model, teacher=teacher)
    other.load_state_dict(state)
    assert other.steps == 3


def test_accumulated_gradients_equal_the_whole_batch():
    model, teacher = pair()
    model.eval()  # BatchNorm would otherwise see other batches.
    x = torch.randn(8, 1, 8, 8)
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        with compress(model, [Distiller(model, teacher=teacher)]) as run:
            for part in x.chunk(parts):
                model(part)
                (run.loss() / parts).backward()
        gradients.append(model.stem.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_features_nearest_link_counts():
    model, teacher = pair()
    x = torch.randn(3, 1, 8, 8)
    link = FeatureLink("stages.0", "_output_0", ("stages.0", "stem"), 2.0, "mse")
    distiller = linked(Distiller(model, teacher=teacher, logits_weight=1.0), link)
    distiller.logits_weight = 0.0
    with compress(model, [distiller]) as run:
        model(x)
        loss = run.loss()
        loss.backward()
    frozen = copy.deepcopy(teacher).eval()
    mine = nn.Sequential(model.stem, model.stem_bn, model.relu, model.stages[0]).train()(x)
    stem = frozen.stem(x)
    theirs = frozen.stages[0](frozen.relu(frozen.stem_bn(stem)))
    distances = [float(((mine - other) ** 2).mean().detach()) for other in (theirs, stem)]
    assert float(loss.detach()) == pytest.approx(2.0 * min(distances), rel=1e-5)
    assert model.stem.weight.grad is not None
    assert model.head.weight.grad is None


class InPlace(nn.Module):
    """A layer whose output is changed in place by what follows, and that is called twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, scale):
        y = nn.functional.relu_(self.linear(x))
        return nn.functional.relu_(self.linear(y)) * scale


def test_recorded_outputs_are_those_before_in_place_changes_and_calls_are_paired():
    model, teacher = InPlace(), InPlace()
    x = torch.randn(5, 4)
    link = FeatureLink("linear", "_output_0", ("linear",), 1.0, "mse")
    distiller = linked(Distiller(model, teacher=teacher), link)
    distiller.logits_weight = 0.0
    with compress(model, [distiller]) as run:
        model(x, scale=torch.ones(()))
        loss = float(run.loss())

    def calls(network: InPlace) -> list[torch.Tensor]:
        first = network.linear(x)
        return [first, network.linear(first.relu())]

    pairs = zip(calls(model), calls(teacher), strict=True)
    expected = sum(float(((a - b) ** 2).mean().detach()) for a, b in pairs) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_inputs_by_position_and_by_name():
    model, teacher = InPlace(), InPlace()
    for target in ("_input_0", "_input_input"):
        link = FeatureLink("linear", target, ("linear",), 1.0, "mse")
        distiller = linked(Distiller(model, teacher=teacher), link)
        distiller.logits_weight = 0.0
        with compress(model, [distiller]) as run:
            model(torch.randn(5, 4), scale=torch.ones(()))
            assert float(run.loss()) > 0
    link = FeatureLink("linear", "_output_3", ("linear",), 1.0, "mse")
    with (
        compress(model, [linked(Distiller(model, teacher=teacher), link)]),
        pytest.raises(ConfigError, match="'linear' has no target '_output_3'; its outputs are _output_0"),
    ):
        model(torch.randn(5, 4), scale=torch.ones(()))


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Wrapped(nn.Module):
    """Gives its logits as Hugging Face does, in one of several ways."""

    def __init__(self, kind: str):
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 3), kind

    def forward(self, pixels=None):
        logits = self.linear(pixels)
        loss = logits.sum()
        kinds = {
            "object": Output(loss, logits),
            "dict": {"loss": loss, "logits": logits},
            "tuple": (loss, logits),
        }
        return kinds[self.kind]


@pytest.mark.parametrize("kind", ["object", "dict", "tuple"])
def test_outputs_of_hugging_face_and_keyword_inputs(kind):
    model, teacher = Wrapped(kind), Wrapped("object")
    x = torch.randn(6, 4)
    with compress(model, [Distiller(model, teacher=teacher, logits_weight=1.0)]) as run:
        model(pixels=x)
        loss = run.loss()
    expected = divergence(model.linear(x), teacher.linear(x), 4.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_autocast_of_the_model_is_the_teachers_too():
    model, teacher = pair()
    seen = []
    teacher.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with compress(model, [Distiller(model, teacher=teacher)]) as run:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(torch.randn(2, 1, 8, 8))
        loss = run.loss()
        loss.backward()
    assert outputs.dtype == seen[0] == torch.bfloat16
    assert loss.dtype == torch.float32


def test_copies_of_a_model_under_distillation_are_free_of_it():
    model, teacher = pair()
    distiller = Distiller(model, teacher=teacher)
    with compress(model, [distiller]) as run:
        model(torch.randn(2, 1, 8, 8))
        twin = copy.deepcopy(model)
        twin(torch.randn(4, 1, 8, 8))
        assert distiller._call.args[0].shape[0] == 2
        run.loss().backward()
    assert twin.stem.weight.grad is None


def test_evaluation_between_forward_and_loss_is_ignored():
    model, teacher = pair()
    x = torch.randn(3, 1, 8, 8)
    with compress(model, [Distiller(model, teacher=teacher, logits_weight=1.0)]) as run:
        outputs = model(x)
        with torch.no_grad():
            model(torch.randn(7, 1, 8, 8))
        target = copy.deepcopy(teacher).eval()(x)
        assert float(run.loss()) == pytest.approx(float(divergence(outputs, target, 4.0)), rel=1e-6)


def test_misuse_is_explained():
    model, teacher = pair()
    with pytest.raises(ConfigError, match="give a copy"):
        Distiller(model, teacher=model)
    with pytest.raises(ConfigError, match="teacher must be"):
        Distiller(model, teacher="resnet")
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        Distiller(model, teacher=teacher, temperature=0)
    with pytest.raises(ConfigError, match="logits_weight must be a number"):
        Distiller(model, teacher=teacher, logits_weight="0.9")
    with pytest.raises(ConfigError, match="nothing to distil"):
        Distiller(model, teacher=teacher, logits_weight=0)
    distiller = Distiller(model, teacher=teacher)
    with pytest.raises(DwindleError, match="not attached"):
        distiller.loss()
    with compress(model, [distiller]) as run:
        with pytest.raises(DwindleError, match="needs a forward pass"):
            run.loss()
        x = torch.randn(2, 1, 8, 8)
        model(x)
        x.zero_()
        with pytest.raises(ConfigError, match="changed in place"):
            run.loss()
    other = residual_network((16, 16), (1, 1), classes=7)
    with compress(model, [Distiller(model, teacher=other)]) as run:
        model(torch.randn(2, 1, 8, 8))
        with pytest.raises(ConfigError, match=r"\(2, 5\) and \(2, 7\)"):
            run.loss()


def test_config_list_gives_links_in_the_order_of_the_model():
    model, teacher = pair()
    distiller = Distiller(
        model,
        [
            {
                "op_names": ["stages.1", "stages.0"],
                "lambda": 0.5,
                "apply_method": "kl",
                "target_names": ["_output_"],
            },
            {"op_names": ["stem"], "link": ["stem", "stages.0"], "target_names": ["_output_0"]},
        ],
        teacher=teacher,
    )
    assert distiller.links == (
        FeatureLink("stem", "_output_0", ("stem", "stages.0"), 1.0, "mse"),
        FeatureLink("stages.0", "_output_0", ("stages.0",), 0.5, "kl"),
        FeatureLink("stages.1", "_output_0", ("stages.1",), 0.5, "kl"),
    )
    with compress(model, [distiller]) as run:
        model(torch.randn(2, 1, 8, 8))
        run.loss().backward()
    assert model.stem.weight.grad is not None


def test_config_list_errors_name_the_place():
    model, teacher = pair()
    entry = {"op_names": ["stages.0"], "target_names": ["_output_0"]}
    with pytest.raises(ConfigError, match=r"no module 'stagse\.1'; did you mean 'stages\.1'"):
        Distiller(model, [{**entry, "link": "stagse.1"}], teacher=teacher)
    with pytest.raises(ConfigError, match="'cosine' is not one of mse, kl"):
        Distiller(model, [{**entry, "apply_method": "cosine"}], teacher=teacher)
    with pytest.raises(ConfigError, match="lamda"):
        Distiller(model, [{**entry, "lamda": 2.0}], teacher=teacher)


def test_other_feature_shapes_are_named():
    model, teacher = pair()
    link = FeatureLink("stages.1", "_output_0", ("stages.0",), 1.0, "mse")
    with compress(model, [linked(Distiller(model, teacher=teacher), link)]) as run:
        model(torch.randn(2, 1, 8, 8))
        with pytest.raises(
            ConfigError, match=r"stages.1._output_0.*'stages.0'.*\(2, 16, 4, 4\) and \(2, 16, 8, 8\)"
        ):
            run.loss()
