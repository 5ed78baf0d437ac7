"""Running means by target: one sum and one count each, whatever the number of batches, added up over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dwindle.config import Target
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.training.processes import is_distributed, sum_over_processes


class Statistics:
    """Weighted sums of what was seen of each target, and the weights' sums.

    Attributes:
        sums: The sum for each target, in float32 at least.
        counts: How much was added to each sum.
    """

    def __init__(self) -> None:
        self.sums: dict[Target, Tensor] = {}
        self.counts: dict[Target, float] = {}

    def __bool__(self) -> bool:
        return bool(self.sums)

    def __contains__(self, target: Target) -> bool:
        return target in self.sums

    def __iter__(self) -> Iterator[Target]:
        return iter(self.sums)

    def clear(self) -> None:
        """Forget everything."""
        self.sums.clear()
        self.counts.clear()

    def add(self, target: Target, value: Tensor, count: float = 1.0) -> None:
        """Add to the sum of a target.

        Args:
            target: Which target it belongs to.
            value: The sum over ``count`` observations; any shape, always the same for one target.
            count: How many observations it stands for.

        Raises:
            DwindleError: The shape is another one than before.
        """
        value = value.detach()
        if not value.is_floating_point() or value.dtype.itemsize < 4:
            value = value.float()
        known = self.sums.get(target)
        if known is None:
            self.sums[target], self.counts[target] = value.clone(), float(count)
            return
        if known.shape != value.shape:
            raise DwindleError(
                f"{target}: the statistics of one call have shape {list(value.shape)}, those of an earlier one "
                f"{list(known.shape)}; is the module called with tensors of different kinds?"
            )
        known += value
        self.counts[target] += float(count)

    def mean(self, target: Target) -> Tensor:
        """Return the mean of what was added for a target (a KeyError when that is nothing)."""
        return self.sums[target] / max(self.counts[target], 1e-300)

    def reduce(self, device: torch.device) -> None:
        """Add everything up over all processes, which need not have seen the same targets.

        Args:
            device: Where counts are exchanged: that of the model.
        """
        if not is_distributed():
            return
        own = {str(target): (tuple(value.shape), value.dtype) for target, value in self.sums.items()}
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        layout = {path: kind for seen in everyone for path, kind in seen.items()}
        for path in sorted(layout):
            target, (shape, dtype) = Target.parse(path), layout[path]
            value = self.sums.get(target)
            whole = torch.zeros(shape, dtype=dtype, device=device) if value is None else value
            count = torch.tensor([self.counts.get(target, 0.0)], dtype=torch.float64, device=device)
            sum_over_processes([whole, count])
            self.sums[target], self.counts[target] = whole, float(count)

    def not_finite(self) -> list[Target]:
        """Return the targets whose sums hold NaN or infinite values."""
        return [target for target, value in self.sums.items() if not bool(torch.isfinite(value).all())]

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts by the targets' paths."""
        return {
            "sums": {str(target): value.clone() for target, value in self.sums.items()},
            "counts": {str(target): count for target, count in self.counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what :meth:`state_dict` gave.

        Args:
            state: The sums and counts.
            device: Where the model is.

        Raises:
            ConfigError: They do not belong together.
        """
        sums, counts = dict(state.get("sums", {})), dict(state.get("counts", {}))
        if set(sums) != set(counts):
            raise ConfigError("saved statistics need a count for each sum")
        self.sums = {Target.parse(path): value.to(device) for path, value in sums.items()}
        self.counts = {Target.parse(path): float(count) for path, count in counts.items()}


def agree(work: Callable[[], None], device: torch.device) -> None:
    """Do something in every process; when it fails in one of them, it fails in all.

    Otherwise the others would wait for ever for the one that gave up.

    Args:
        work: What to do.
        device: Where the processes exchange a number.

    Raises:
        DwindleError: It failed in another process only; otherwise the error of ``work`` itself.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as caught:
        if not is_distributed():
            raise
        error = caught
    failed = torch.tensor([float(error is not None)], device=device)
    sum_over_processes([failed])
    if error is not None:
        raise error
    if float(failed) > 0:
        raise DwindleError("the model could not be observed in another process; see the error there")
