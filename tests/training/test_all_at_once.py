"""Pruning and distillation in one run of the user's own loop, realized behind it."""

import copy

import torch
from torch import nn

import dwindle.realize  # noqa: F401  (registers itself for run.realize)
from dwindle.distillation import Distiller
from dwindle.pruning import L1NormPruner
from dwindle.training import compress
from dwindle.zoo import residual_network


def test_prune_distil_train_realize():
    model = residual_network((16, 32), (1, 1))
    teacher = copy.deepcopy(model)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    identities = [id(parameter) for parameter in model.parameters()]
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=(x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with compress(model, [pruner, Distiller(model, teacher=teacher)]) as run:
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(x), y) + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert float((model.stem.weight == 0).double().mean()) == 0.5
    small = run.realize(example_inputs=(x,)).model
    assert small.stem.out_channels == 8
    assert sum(p.numel() for p in small.parameters()) < 0.3 * sum(p.numel() for p in teacher.parameters())
