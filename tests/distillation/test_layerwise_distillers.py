"""NNI's two distillers, natively."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from dwindle.training import compress

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def test_dynamic_takes_the_nearest_of_several_links() -> None:
    model, teacher = network(5, 0), network(5, 1)
    config = [
        {"op_names": ["0"], "link": ["0", "2"], "lambda": 0.75},
        {"op_names": ["4"], "apply_method": "kl"},
    ]
    distiller = DynamicLayerwiseDistiller(model, config, teacher=teacher, origin_loss_lambda=0.3)
    with compress(model, [distiller]):
        task = model(X).square().mean()
        total = distiller.total(task)
    with torch.no_grad():
        mine, first = model[0](X), teacher[0](X)
        second = teacher[2](torch.relu(first))
        nearest = min(float((mine - other).square().mean()) for other in (first, second))
        q, p = (model(X) / 2).log_softmax(-1), (teacher(X) / 2).softmax(-1)
        divergence = float(nn.functional.kl_div(q, p, reduction="batchmean")) * 4
    assert float(total.detach()) == pytest.approx(
        0.3 * float(task.detach()) + 0.75 * nearest + divergence, rel=1e-5
    )


def test_adaptive_projects_the_last_dimension() -> None:
    model, teacher = network(5, 0), network(7, 1)
    config = [{"op_names": ["0", "2", "4"]}, {"op_names": ["1"], "target_names": ["_input_0", "_output_0"]}]
    distiller = Adaptive1dLayerwiseDistiller(model, config, teacher=teacher)
    with pytest.raises(DwindleError, match="track_forward"), compress(model, [distiller]):
        pass
    distiller.track_forward(X)
    # One linear layer for each target whose widths differ; NNI kept one for all targets of a module.
    assert [tuple(own.shape) for own in distiller.parameters()] == [(7, 5), (7,)] * 4
    with compress(model, [distiller]) as run:
        model(X)
        loss = run.loss()
        loss.backward()
    assert all(own.grad is not None for own in distiller.parameters())
    names = {key.split("|")[1] for key in distiller.state_dict()["adapters"] if key.startswith("1|")}
    assert names == {"_input_0", "_output_0"}
    with pytest.raises(ConfigError, match="takes one link"):
        Adaptive1dLayerwiseDistiller(model, [{"op_names": ["0"], "link": ["0", "2"]}], teacher=teacher)
