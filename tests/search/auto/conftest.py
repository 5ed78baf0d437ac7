"""The small network that candidates are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwindle import zoo
from dwindle.search.auto.variant import Workpiece


@pytest.fixture
def workpiece() -> Workpiece:
    torch.manual_seed(0)
    model = zoo.digits_resnet((8, 16), (2, 1)).eval()
    data = zoo.digits().first(64, 64)
    batches = [(data.train_images[:32], data.train_labels[:32])]
    return Workpiece(model, (data.test_images[:2],), {}, batches, nn.functional.cross_entropy)
