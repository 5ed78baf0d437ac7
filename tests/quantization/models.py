"""Small models with the structures that quantization must survive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolutions with batch normalization, a depthwise one, a residual sum, an SE gate, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 8, 1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.branch = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.norm(self.depthwise(x)), inplace=True)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.project(y * gate)
        y += x
        y = F.relu(y)
        y = torch.cat([F.relu(self.branch(F.pad(y, (0, 1, 0, 1)))), F.max_pool2d(y, 2)], dim=1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Encoder(nn.Module):
    """A small transformer on token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embedding(tokens)
        if mask is not None:
            hidden = hidden * mask[..., None]
        return {"logits": self.head(self.layers(hidden).mean(1))}


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Give batch normalizations statistics and affine parameters that are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def residual() -> tuple[nn.Module, Tensor]:
    """Return the convolutional model and a batch for it."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    return with_statistics(Residual(), x), x
