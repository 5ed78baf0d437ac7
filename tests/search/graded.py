"""A residual convnet in float64 whose channels rank alike by every norm, and changes to it by hand in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Graded(nn.Module):
    """Two axes: stem (coupled over the residual, six channels) and inner (eight)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.back = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.back(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def graded() -> Graded:
    """Channel ``c`` of an axis is 1.4 ** c times as large, wherever it is made or read."""
    torch.manual_seed(3)
    model = Graded().double()
    with torch.no_grad():
        for name, dim in (("stem", 0), ("back", 0), ("inner", 1), ("head", 1), ("inner", 0), ("back", 1)):
            weight = model.get_submodule(name).weight
            weight.copy_(weight.sign() * (0.05 + weight.abs()))
            factor = 1.4 ** torch.arange(weight.shape[dim]).double() / weight.shape[dim]
            weight.mul_(factor.reshape([-1 if own == dim else 1 for own in range(weight.dim())]))
        for norm in (model.norm.running_mean, model.norm.weight, model.norm.running_var):
            norm.copy_(0.5 + torch.rand(6))
        model.norm.bias.add_(2.0)  # so that no channel is dead
        model.inner.bias.add_(1.0)
    return model.eval()


def batches() -> list[Tensor]:
    """Two batches of fixed random images."""
    chance = torch.Generator().manual_seed(7)
    return [torch.randn(6, 3, 6, 6, generator=chance, dtype=torch.float64) for _ in range(2)]


def noise(model: nn.Module, changed: nn.Module, data: Sequence[Tensor]) -> float:
    """Energy of the change of the outputs over that of the outputs."""
    with torch.no_grad():
        before = torch.cat([model(x) for x in data])
        after = torch.cat([changed(x) for x in data])
    return float((after - before).square().sum() / before.square().sum())


def cut(model: Graded, axis: str, count: int) -> Graded:
    """The model with the first ``count`` channels of an axis at zero."""
    changed = copy.deepcopy(model)
    made = {"stem": (changed.stem, changed.norm, changed.back), "inner": (changed.inner,)}[axis]
    with torch.no_grad():
        for module in made:
            module.weight[:count] = 0
            module.bias[:count] = 0
    return changed


def folded(model: Graded) -> Graded:
    """The model with its normalization in the stem."""
    changed = copy.deepcopy(model)
    norm = changed.norm
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        changed.stem.weight.mul_(factor.reshape(-1, 1, 1, 1))
        changed.stem.bias.copy_((changed.stem.bias - norm.running_mean) * factor + norm.bias)
    changed.norm = nn.Identity()
    return changed


def rounded(model: Graded, layer: str, bits: int, read_bits: int, data: Sequence[Tensor]) -> Graded:
    """The model with one layer's weight rounded per channel, and its input with one scale from all data."""
    changed = folded(model)
    module = changed.get_submodule(layer)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for x in data:
            changed(x)
    handle.remove()
    highest = 2 ** (bits - 1) - 1
    with torch.no_grad():
        rows = module.weight.flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / highest).float().double()
        module.weight.copy_(
            ((rows / scale).round().clamp(-highest, highest) * scale).reshape(module.weight.shape)
        )
    if read_bits:
        low, high = min(0.0, *(float(x.min()) for x in seen)), max(0.0, *(float(x.max()) for x in seen))
        top = 2**read_bits - 1
        step = float(torch.tensor((high - low) / top).float())
        zero = round(-low / step)
        module.register_forward_pre_hook(
            lambda _, args: (((args[0] / step).round() + zero).clamp(0, top) - zero) * step
        )
    return changed


def of_rank(model: Graded, layer: str, rank: int) -> Graded:
    """The model with one matrix at its best approximation of a rank."""
    changed = copy.deepcopy(model)
    module = changed.get_submodule(layer)
    left, values, right = torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False)
    with torch.no_grad():
        product = left[:, :rank] * values[:rank] @ right[:rank]
        module.weight.copy_(product.reshape(module.weight.shape))
    return changed
