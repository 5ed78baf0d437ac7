"""``run.realize()`` cuts channels and makes chains of learned ranks, and what comes out is what was trained."""

from __future__ import annotations

import torch
from torch import nn

import dwindle as dw
from dwindle.factorization import LowRankTraining
from dwindle.pruning import L1NormPruner
from dwindle.training import Staged

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


def test_channels_and_ranks_in_one_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    channels = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, channels, example_inputs=(X,))
    ranks = LowRankTraining(model, [{"op_names": ["2"], "rank": 5}], example_inputs=(X,), training_steps=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with dw.compress(model, [pruner, Staged(ranks, start=2)]) as run:
        run.add_parameters_to(optimizer)
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(X), torch.arange(16) % 4) + run.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        assert ranks.finished
    expected = model.double()(X.double())
    model.float()
    result = run.realize((X,))
    assert result.factorization.layers["2"].ranks == (5,)
    assert result.model[0].out_features == 16
    assert result.factorization.macs_after < result.factorization.macs_before
    assert sum(own.numel() for own in result.model.parameters()) == result.parameters_after < 1000
    torch.testing.assert_close(result.model(X).double(), expected, rtol=1e-4, atol=1e-5)
    result.model(X).sum().backward()
