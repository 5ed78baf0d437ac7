"""The group regularizer against its formula, its gradient, and what it is for: groups near zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.graph import analyse
from dwindle.pruning.group_sparsity import GroupSparsity, group_norms, shrinkage
from dwindle.pruning.shared_axes import shared_axes


class Network(nn.Module):
    """Two layers with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def model() -> Network:
    """A network in double precision."""
    torch.manual_seed(0)
    made = Network().double()
    nn.init.uniform_(made.norm.weight, 0.5, 2.0)
    return made


def inputs() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


def by_hand(model: Network, sharpness: float) -> tuple[list[float], list[float]]:
    """Norms and weights of the eight groups, one number after the other."""
    norms = []
    model = copy.deepcopy(model).requires_grad_(False)
    for k in range(8):
        first = sum(float(w) ** 2 for w in model.first.weight[k])
        norms.append(
            first + float(model.norm.weight[k]) ** 2 + sum(float(w) ** 2 for w in model.second.weight[:, k])
        )
    spread = max(norms) - min(norms)
    return norms, [2 ** (sharpness * (max(norms) - own) / spread) for own in norms]


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_the_penalty_is_that_of_the_paper(model: Network, sharpness: float) -> None:
    penalty = GroupSparsity(model, inputs(), strength=0.01, sharpness=sharpness)
    norms, weights = by_hand(model, sharpness)
    axis = shared_axes(model, analysis := analyse(model, (inputs(),)), analysis.selected())[0]
    found = group_norms(axis, dict(model.named_parameters()))
    assert found.tolist() == pytest.approx(norms, rel=1e-12)
    assert shrinkage(found.detach(), sharpness).tolist() == pytest.approx(weights, rel=1e-12)
    expected = 0.01 * sum(g * own for g, own in zip(weights, norms, strict=True))
    loss = penalty.loss()
    assert isinstance(loss, Tensor)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    # the weights of the groups are constants: the gradient is 2 * strength * gamma * w
    scale = 2 * 0.01 * torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(model.first.weight.grad, scale[:, None] * model.first.weight.detach())
    torch.testing.assert_close(model.norm.weight.grad, scale * model.norm.weight.detach())
    torch.testing.assert_close(model.second.weight.grad, scale * model.second.weight.detach())
    assert model.first.bias.grad is None
    assert model.norm.bias.grad is None


def test_equal_groups_are_pushed_alike() -> None:
    assert torch.equal(shrinkage(torch.full((3,), 2.0), 4.0), torch.ones(3))


def test_training_with_it_brings_groups_to_zero_that_can_be_cut(model: Network) -> None:
    x = torch.randn(64, 5, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = GroupSparsity(model, x[:4], strength=2e-3, sharpness=6.0, training_steps=300)
    with dw.compress(model, [penalty]) as run:
        for _ in range(300):
            loss = nn.functional.cross_entropy(model(x), y) + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        assert penalty.finished
        assert run.loss() == 0.0
    norms = torch.tensor(by_hand(model, 4.0)[0]).sort().values
    assert float(norms[3] / norms[-1]) < 0.02
    model.eval()
    before = model(x).detach()
    result = dw.prune(model, x[:4], ratio=0.5, importance="group_norm")
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9
    agreement = (before.argmax(1) == model(x).argmax(1)).double().mean()
    assert float(agreement) > 0.95


def test_goes_on_from_its_state(model: Network) -> None:
    first = GroupSparsity(model, inputs(), training_steps=3)
    first.step()
    second = GroupSparsity(model, inputs(), training_steps=3)
    second.load_state_dict(first.state_dict())
    assert second.steps == 1
    with pytest.raises(ConfigError, match="needs steps"):
        second.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength"),
        ({"sharpness": float("nan")}, "sharpness"),
        ({"training_steps": 0}, "training_steps"),
        ({"axes": ["heads"]}, "has no 'heads'"),
    ],
)
def test_wrong_arguments(model: Network, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupSparsity(model, inputs(), **options)  # type: ignore[arg-type]
