"""Which tensor of a model's output counts."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from dwindle.training.batches import logits_of

WANTED, OTHER = torch.randn(2, 3), torch.randn(2, 4)


@pytest.mark.parametrize(
    "outputs",
    [
        WANTED,
        {"loss": OTHER, "logits": WANTED},
        {"aux": OTHER, "out": WANTED},
        OrderedDict(last_hidden_state=WANTED, pooler_output=OTHER),
        SimpleNamespace(last_hidden_state=WANTED, hidden_states=None),
        (torch.tensor(1.0), torch.arange(4), WANTED, OTHER),
    ],
)
def test_logits(outputs: object) -> None:
    assert logits_of(outputs) is WANTED


def test_logits_go_before_hidden_states() -> None:
    assert logits_of({"last_hidden_state": OTHER, "logits": WANTED}) is WANTED
