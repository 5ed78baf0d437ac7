"""Which tensor of the original model a tensor of the small one came from, and which of its indices stayed.

Both are read from the history that every realization leaves with the small model, so they survive saving and
loading, and several prunings of one model compose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.config.history import history
from dwindle.realize.plan import Plan


@dataclass(slots=True)
class Correspondence:
    """What was done to the original on the way to the small model, oldest first."""

    plans: list[Plan] = field(default_factory=list)

    def source(self, name: str) -> str:
        """Return the name that a tensor of the small model has in the original.

        Args:
            name: Name of a parameter or buffer of the small model.
        """
        for plan in reversed(self.plans):
            name = _before(name, plan)
        return name

    def kept(self, name: str, dim: int) -> Tensor | None:
        """Return which indices of a dimension of the original's tensor the small one still has; None is all.

        Args:
            name: Name of a parameter of the small model.
            dim: Dimension.
        """
        index: Tensor | None = None
        for plan in reversed(self.plans):
            name = _before(name, plan)
            own = plan.keep.get(name, {}).get(dim)
            if own is not None:
                index = own if index is None else own[index]
        return index

    def is_scaled(self, name: str) -> bool:
        """Whether the values of a parameter were multiplied to make up for a changed temperature.

        Args:
            name: Name of a parameter of the small model.
        """
        for plan in reversed(self.plans):
            name = _before(name, plan)
            if any(name in entry["parameters"] for entry in plan.scales):
                return True
        return False


def correspondence(small: nn.Module, original: nn.Module) -> Correspondence:
    """Read how the small model came from the original one.

    Args:
        small: The model as it is now.
        original: The model as it was.

    Raises:
        ConfigError: Their histories contradict each other.
    """
    now, then = history(small), history(original)
    if now[: len(then)] != then:
        raise ConfigError("original: this model was pruned otherwise; the small model did not come from it")
    return Correspondence(
        [Plan.from_json(entry["plan"]) for entry in now[len(then) :] if entry["kind"] == "shrink"]
    )


def _before(name: str, plan: Plan) -> str:
    """Return a name as it was before entries of lists were taken out: the later ones had moved up."""
    gone: dict[str, set[int]] = {}
    for path in [*(block.path for block in plan.blocks if block.deleted), *plan.entries]:
        parent, _, entry = path.rpartition(".")
        if entry.isdigit():
            gone.setdefault(parent, set()).add(int(entry))
    if not gone:
        return name
    above: list[str] = []
    for part in name.split("."):
        removed = gone.get(".".join(above))
        if removed and part.isdigit():
            number, left = -1, int(part)
            while left >= 0:
                number += 1
                left -= number not in removed
            part = str(number)
        above.append(part)
    return ".".join(above)


def cut_as(tensor: Tensor, name: str, link: Correspondence) -> Tensor:
    """Return a tensor of the original as the small model has it, without the scales that were worked in.

    Args:
        tensor: The original's.
        name: Its name in the small model.
        link: How the small model came from the original.
    """
    for dim in range(tensor.dim()):
        index = link.kept(name, dim)
        if index is not None and (not index.numel() or int(index.max()) < tensor.shape[dim]):
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def row_factors(small: Tensor, original: Tensor, dim: int) -> Tensor:
    """Return by which number each output of a scaled weight was multiplied.

    Args:
        small: The weight as it is.
        original: The original's weight, cut to the same shape.
        dim: The dimension of the outputs.

    Returns:
        One number an output, float64.
    """
    count = small.shape[dim]
    now, then = (tensor.detach().double().movedim(dim, 0).reshape(count, -1) for tensor in (small, original))
    power = then.square().sum(1)
    return torch.where(power > 0, (now * then).sum(1) / power.clamp_min(1e-30), torch.ones_like(power))
