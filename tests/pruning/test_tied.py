"""Parameters that stand in several modules, and pruners that come and go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwindle import simulate
from dwindle.pruning import L1NormPruner, LevelPruner


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        return self.head(x + self.narrow(F.gelu(self.wide(x))))


def test_without_inputs_a_tied_parameter_has_one_mask_everywhere() -> None:
    model = Tied()
    masks = LevelPruner(model, [{"op_names": ["head"], "sparse_ratio": 0.5}]).compress()[1]
    assert torch.equal(masks["head"]["weight"], masks["embedding"]["weight"])
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert float((model.embedding.weight == 0).float().mean()) == 0.5


def test_with_inputs_channels_of_a_tied_embedding_go_and_its_words_stay() -> None:
    model, index = Tied(), torch.randint(0, 20, (2, 5))
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], example_inputs=index)
    model, masks = pruner.compress()
    words = masks["embedding"]["weight"]
    kept = masks["narrow"]["bias"]
    assert torch.equal(words, kept.expand(20, 8))
    assert torch.equal(words, masks["head"]["weight"])
    assert int(kept.sum()) == 4
    assert any("head.weight" in note for note in pruner.report().notes)
    hidden = model.embedding(index) + model.narrow(F.gelu(model.wide(model.embedding(index))))
    assert torch.equal(hidden[..., kept == 0], torch.zeros(2, 5, 4))


def test_attach_and_detach_of_one_pruner_leave_the_other_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    second = LevelPruner(model, [{"op_names": ["1"], "sparse_ratio": 0.25}])
    first.attach()
    first.attach()  # does nothing more
    second.attach()
    masked = model[1].weight.detach().clone()
    first.detach(keep_values=False)
    assert type(model[0]) is nn.Linear
    assert not (model[0].weight == 0).any()
    assert torch.equal(model[1].weight, masked)
    first.attach()
    assert float((model[0].weight == 0).float().mean()) == 0.5
    assert {target.module for target in simulate.get_masks(model)} == {"0", "1"}
