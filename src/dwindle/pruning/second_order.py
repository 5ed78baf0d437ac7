"""The pruner that knows the curvature of the loss: Optimal Brain Damage, with two estimates of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.pruning.observation import ObservingPruner
from dwindle.training.hessian import hutchinson
from dwindle.training.processes import rank

#: Estimates of the Hessian's diagonal.
CURVATURES = ("fisher", "hutchinson")


def saliency(weight: Tensor, curvature: Tensor) -> Tensor:
    """Return what the loss gains when single weights are removed, ``|h| w^2 / 2`` (LeCun et al. 1990, equation 4).

    The formula holds at a minimum, where no ``h`` is negative; an estimate that is negative all the same counts by
    its size.

    Args:
        weight: The weights.
        curvature: ``h``, the Hessian's diagonal, of the same shape.
    """
    return curvature.abs() * weight.to(curvature.dtype).square() / 2


def samples_of(batch: Any) -> Iterator[Any]:
    """Yield the samples of a batch as batches of one, whatever tensors it nests."""
    for number in range(_count(batch)):
        yield _sample(batch, number)


def _count(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return max((_count(part) for part in parts), default=0)


def _sample(batch: Any, number: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[number : number + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _sample(part, number) for key, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [_sample(part, number) for part in batch]
    return batch


class OBDPruner(ObservingPruner):
    """Blocks whose removal would change the loss least, to second order, go (LeCun et al., Optimal Brain Damage).

    The metric of a weight is ``h w^2 / 2``, with ``h`` on the diagonal of the loss's Hessian; a block sums it. The
    diagonal is estimated over the batches:

    - ``fisher``: the empirical Fisher information, the mean over samples of the squared gradient (Theis et al.,
      arXiv:1801.05787). It never is negative and costs one backward pass a sample; with ``per_sample=False`` the
      gradient of a whole batch is squared, which is faster and blurs it. In a training run it is always the latter,
      with the gradient that the optimizer gets.
    - ``hutchinson``: signs ``z`` with ``E[z * (H z)]`` = the diagonal, whatever the loss. It needs ``data``.

    Args:
        model: As in :class:`Pruner`.
        config_list: As in :class:`Pruner`.
        example_inputs: As in :class:`Pruner`.
        example_kwargs: As in :class:`Pruner`.
        curvature: ``fisher`` or ``hutchinson``.
        per_sample: Whether the Fisher information is that of single samples.
        probes: Random directions for each batch (Hutchinson).
        seed: Of the random directions.
        observation: ``data``, ``loss``, ``batches``, ``adapt`` or ``training_steps``, as in
            :class:`ObservingPruner`.

    Raises:
        ConfigError: An argument is not valid.
    """

    works_sharded = False

    default_granularity = None
    needs_gradients = True

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        curvature: Literal["fisher", "hutchinson"] = "fisher",
        per_sample: bool = True,
        probes: int = 1,
        seed: int = 0,
        **observation: Any,
    ) -> None:
        if curvature not in CURVATURES:
            hint = did_you_mean(str(curvature), CURVATURES)
            raise ConfigError(f"curvature: {curvature!r} is not one of {', '.join(CURVATURES)}{hint}")
        if isinstance(probes, bool) or probes < 1:
            raise ConfigError(f"probes: {probes!r} is not a positive number")
        super().__init__(model, config_list, example_inputs, example_kwargs, **observation)
        if curvature == "hutchinson" and self.training_steps is not None:
            raise ConfigError("hutchinson differentiates twice, which a training run does not; give data=")
        self.curvature, self.per_sample, self.probes, self.seed = curvature, per_sample, probes, seed
        self._signs = torch.Generator()

    def observe(self) -> None:
        """Start the random directions anew (others in each process), then run over the data."""
        self._signs.manual_seed(self.seed + 7919 * rank())
        super().observe()

    def forward(self, batch: Any) -> None:
        """Add the curvature of one batch."""
        if self.curvature == "fisher":
            for part in samples_of(batch) if self.per_sample else [batch]:
                super().forward(part)
            return
        modules = dict(self.model.named_modules())
        found = {target: modules[target.module]._parameters[target.name] for target in self.plan.goals}
        weights = {target: own for target, own in found.items() if own is not None}
        # The fused kernels of attention can be differentiated once only.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self.loss_of(batch)
            for _ in range(self.probes):
                for target, own in zip(
                    weights, hutchinson(loss, list(weights.values()), self._signs), strict=True
                ):
                    zero = torch.zeros_like(weights[target])
                    self.add(target, zero if own is None else own)

    def gradients(self) -> None:
        """Add the squared gradient of a sample, of a batch or of an optimizer step."""
        for target in self.plan.goals:
            gradient = self.gradient_of(target)
            if gradient is not None:
                self.add(target, gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square())

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the sum over each block of ``h w^2 / 2``."""
        return granularity.reduce(saliency(weight, self.mean(target)), "sum")
