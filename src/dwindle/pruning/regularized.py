"""Regularization-based sparsity (RB): every weight has a learned probability to stay, and a loss says how many may.

As in NNCF (Kozlov et al., "Neural Network Compression Framework for fast model inference",
https://arxiv.org/abs/2002.08679), which takes the idea of learned Bernoulli masks from Louizos et al. and the
gradient straight through the threshold from Srinivas et al., "Training Sparse Neural Networks"
(https://arxiv.org/abs/1611.06694).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError
from dwindle.pruning.plan import PlannedTarget
from dwindle.pruning.sampling import SampledPruner, ranked_groups, share_penalty
from dwindle.training.schedule import Schedule

__all__ = ["RBPruner", "SampledMask", "kept_share"]

#: The probability to stay with which the median weight begins.
_FIRST_PROBABILITY = 0.99


def kept_share(scores: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return which share of the weights stays, ``sigmoid(score) > 0.5``.

    Backwards the threshold is passed straight through, so the gradient is that of the sigmoids.

    Args:
        scores: Logits of the blocks of each target.
        sizes: Number of weights in one block of each target.

    Returns:
        A 0-d tensor between 0 and 1.
    """
    kept = []
    for score, size in zip(scores, sizes, strict=True):
        soft = torch.sigmoid(score)
        count = torch.count_nonzero(score > 0).double()  # exact for any number of weights
        kept.append(size * (count + (soft - soft.detach()).sum()))
    total = sum(score.numel() * size for score, size in zip(scores, sizes, strict=True))
    return (torch.stack(kept).sum() / total).to(scores[0].dtype)


class SampledMask(simulate.ScoredMask):
    """A mask that is drawn in training: 1 where ``sigmoid(score + noise) > 0.5``; in evaluation ``value`` acts.

    Attributes:
        noise: Logistic noise of the present step, one number for each block.
        earlier: What was masked before, in full size; 1 where nothing was.
        sampling: Whether masks are drawn in training.
    """

    noise: Tensor
    earlier: Tensor

    def __init__(self, score: Tensor, granularity: Granularity, noise: Tensor) -> None:
        super().__init__(score, granularity)
        self.register_buffer("noise", noise, persistent=False)
        self.register_buffer("earlier", torch.ones((), device=score.device), persistent=False)
        self.sampling = True

    def deterministic(self, shape: torch.Size) -> Tensor:
        """Return the mask without noise, for a parameter of this shape."""
        kept = (self.score.detach() > 0).to(self.value.dtype)
        return self.granularity.compact(kept, shape) * self.earlier

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the masked tensor, of the same shape and dtype."""
        if self.frozen or not (self.training and self.sampling):
            return super().forward(tensor)
        logit = self.score + self.noise
        kept = (logit.detach() > 0).to(tensor.dtype)  # the sigmoid is above a half
        mask = self.granularity.compact(kept, tensor.shape) * self.earlier
        return simulate.straight_through(tensor, torch.sigmoid(logit), mask, self.granularity)


class RBPruner(SampledPruner):
    """Weights whose learned probability to stay is smallest go.

    The median weight begins with a probability of 0.99 to stay; with ``prior`` larger ones begin with more and smaller
    ones with less, so that short fine-tuning need not find out what magnitude says already (0 is NNCF's form). In
    training every weight (or block) stays with probability ``sigmoid(score)``, drawn anew at every step; the
    gradient of its mask goes straight through the threshold into the score. ``run.loss()`` adds
    ``((kept - (1 - level)) / width)**2``, where ``kept`` is the share with a probability above a half and ``level``
    rises to the ratio of the config_list: one penalty for each ``global_group_id``, and for each target without one;
    the mean of them counts. After ``training_steps`` exactly the ratio with the smallest scores goes, and no mask is
    drawn any more.

    Scores are logits with small gradients, which Adam can train: :func:`dwindle.training.fit` gives them their own
    beside SGD, :meth:`CompressionRun.adaptive_optimizer` makes one for other loops. Every process draws the same masks.

    Args:
        model: As in :class:`~dwindle.pruning.Pruner`.
        config_list: As in :class:`~dwindle.pruning.Pruner`; with ratios, not with thresholds.
        example_inputs: As in :class:`~dwindle.pruning.Pruner`.
        example_kwargs: As in :class:`~dwindle.pruning.Pruner`.
        training_steps: Optimizer steps until the masks stand.
        schedule: Share of the ratio by optimizer step, 0 to 1; None rises as ``1 - (1 - t)**3`` over the first 60 %
            of ``training_steps``.
        width: Distance from the level at which the penalty is 1.
        learning_rate: Of the scores; None is 30 over ``training_steps``, at most 0.1, which suits Adam.
        seed: Of the masks that are drawn; the same in all processes of a run.
        prior: The first logit of a block is that of 0.99 plus ``prior`` times the logit of its norm's rank in its
            target, between 0 and 1.

    Raises:
        ConfigError: An argument is not valid.
    """

    default_granularity = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        training_steps: int,
        schedule: Schedule | None = None,
        width: float = 0.05,
        learning_rate: float | None = None,
        seed: int = 0,
        prior: float = 1.0,
    ) -> None:
        super().__init__(
            model,
            config_list,
            example_inputs,
            example_kwargs,
            training_steps=training_steps,
            schedule=schedule,
            width=width,
            learning_rate=learning_rate,
            seed=seed,
        )
        if not prior >= 0:
            raise ConfigError(f"prior: {prior!r} is not a number from 0 on")
        self.prior = prior

    def make_simulator(self, planned: PlannedTarget, weight: Tensor) -> nn.Module:
        """Return a mask that is drawn; the median block has a probability of 0.99 to stay."""
        noise = self.noise_of(planned, weight.device)
        norms = planned.granularity.reduce(weight.float().square()).sqrt()
        score = torch.full_like(noise, math.log(_FIRST_PROBABILITY / (1 - _FIRST_PROBABILITY)))
        if self.prior and norms.numel() > 1:
            ranks = norms.flatten().argsort(stable=True).argsort().add(0.5).div(norms.numel())
            score += self.prior * torch.logit(ranks).view_as(score)
        mask = SampledMask(score, planned.granularity, noise)
        before = self._before.get(planned.target)
        if before is not None:
            mask.earlier = before.to(score)
        return mask

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return the score of each block."""
        return self._masks()[target].score.detach()

    def _masks(self) -> dict[Target, SampledMask]:
        return {
            target: simulator
            for target, simulator in self.simulators.items()
            if isinstance(simulator, SampledMask)
        }

    def penalty(self) -> Tensor | float:
        """The mean over groups of the squared distance from the level."""
        share = self.schedule(self.steps)
        goals, masks = self.plan.goals, self._masks()
        penalties = [
            share_penalty(
                kept_share(
                    [masks[target].score for target in group], [goals[target].block_size for target in group]
                ),
                (goals[group[0]].setting.goal or 0.0) * share,
                self.width,
            )
            for group in ranked_groups(goals)
        ]
        return torch.stack(penalties).mean()

    def advance(self) -> None:
        """Draw the masks of the next step, and renew those that act in evaluation."""
        super().advance()
        for target, mask in self._masks().items():
            mask.value = mask.deterministic(torch.Size(self.plan.goals[target].shape))

    def finish(self) -> None:
        """Make the masks final: exactly the ratio goes.

        Raises:
            ConfigError: ``compress()`` was not called.
            DwindleError: A score is not a number; the masks stay as they were.
        """
        reached = None if self.finished else self._reached()
        super().finish()
        if reached is not None and abs(reached[0] - reached[1]) > 2 * self.width:
            warnings.warn(
                f"{type(self).__name__}: the scores had masked {reached[0]:.1%} of the weights by themselves where "
                f"{reached[1]:.1%} were asked, and were brought to that at once; give the scores Adam, another "
                "learning_rate=, or more steps",
                stacklevel=4,
            )

    def _reached(self) -> tuple[float, float]:
        """Return the share that the scores alone mask, and the share that is asked, of all weights together."""
        goals, gone, asked, total = self.plan.goals, 0.0, 0.0, 0
        for target, mask in self._masks().items():
            weights = math.prod(goals[target].shape)
            gone += float((mask.score.detach() <= 0).double().mean()) * weights
            asked += (goals[target].setting.goal or 0.0) * weights
            total += weights
        return gone / max(total, 1), asked / max(total, 1)
