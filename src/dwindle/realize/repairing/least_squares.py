"""Ridge regression from streamed second moments. Pure functions of tensors; nothing here knows of models.

A layer gives ``output = W x``; what is missing to its target is the residual ``r``. The correction ``D`` that is added
to ``W`` minimizes ``E |r - D x|^2 + strength * sum_f E[x_f^2] D_f^2``: the more it is regularized, the nearer the layer
stays to what it was, whatever the scales of its features (Hoerl and Kennard, "Ridge regression", 1970; for layers of
pruned networks: He, Zhang and Sun, arXiv:1707.06168, section 3.1). A feature that is always one gives the bias, so
that absorbing means and reconstructing weights are one problem. Expectations are sums over batches: nothing of a batch
is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tried from the strongest regularization to the weakest, until the held-out error grows.
STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001, 0.0001)

#: Share of the mean that every feature's second moment has at least, so that dead features stay where they are.
_FLOOR = 1e-3

#: A layer that lacks no larger share of its outputs' variance has nothing to repair.
_NOTHING = 1e-9

#: Outputs of a masked layer on which the strength is chosen.
_MOST_TRIED_ROWS = 32


@dataclass(slots=True)
class Moments:
    """Sums over samples of one least-squares problem (``groups`` of them side by side, for convolutions).

    Attributes:
        gram: Sum of ``x x'``, ``[groups, features, features]``, float64.
        cross: Sum of ``x r'``, ``[groups, features, outputs]``, float64.
        square: Sum of ``r^2``, ``[groups, outputs]``, float64.
        target: Sum of the squared deviations of the target from its mean over the batch, over all outputs.
        count: Number of samples.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    target: float
    count: int

    @classmethod
    def of(cls, features: Tensor, residual: Tensor, target: Tensor) -> Moments:
        """Return the sums of one batch.

        Args:
            features: ``[groups, samples, features]``.
            residual: ``[groups, samples, outputs]``, what the outputs lack.
            target: What the outputs should be, of the same shape.
        """
        turned = features.transpose(1, 2)
        centred = target - target.mean(1, keepdim=True)
        return cls(
            (turned @ features).double(),
            (turned @ residual).double(),
            residual.square().sum(1).double(),
            float(centred.square().sum()),
            features.shape[1],
        )

    def add(self, other: Moments) -> None:
        """Add the sums of another batch."""
        self.gram += other.gram
        self.cross += other.cross
        self.square += other.square
        self.target += other.target
        self.count += other.count

    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(part).all()) for part in (self.gram, self.cross, self.square))


def squared_error(moments: Moments, correction: Tensor) -> Tensor:
    """Return the mean squared error that a correction leaves, per output.

    Args:
        moments: Of the samples it is judged on.
        correction: ``[groups, features, outputs]``.

    Returns:
        ``[groups, outputs]``.
    """
    linear = (moments.cross * correction).sum(1)
    quadratic = (correction * (moments.gram @ correction)).sum(1)
    return ((moments.square - 2 * linear + quadratic) / moments.count).clamp_min(0.0)


def ridge(moments: Moments, strength: float, support: Tensor | None = None) -> Tensor:
    """Return the correction that minimizes the regularized error.

    Args:
        moments: Of the samples it is fitted to.
        strength: Of the regularization, larger than zero, relative to the second moment of each feature.
        support: Which entries may differ from zero, ``[groups, features, outputs]``; None is all. Each output is then
            a problem of its own.

    Returns:
        ``[groups, features, outputs]``, float64.
    """
    gram = regularized(moments, strength)
    if support is None or bool(support.all()):
        return torch.cholesky_solve(moments.cross, torch.linalg.cholesky(gram))
    result = torch.zeros_like(moments.cross)
    dense = support.all(1)
    for group in range(len(gram)):
        own = dense[group]
        if bool(own.any()):
            factor = torch.linalg.cholesky(gram[group])
            result[group][:, own] = torch.cholesky_solve(moments.cross[group][:, own], factor)
        for output in (~own).nonzero().flatten().tolist():
            chosen = support[group, :, output].nonzero().flatten()
            if chosen.numel():
                factor = torch.linalg.cholesky(gram[group][chosen][:, chosen])
                cross = moments.cross[group][chosen, output, None]
                result[group][chosen, output] = torch.cholesky_solve(cross, factor)[:, 0]
    return result


def regularized(moments: Moments, strength: float) -> Tensor:
    """Return ``gram + strength * diag(gram)``, with a floor below the diagonal.

    Args:
        moments: The sums.
        strength: Of the regularization.
    """
    diagonal = moments.gram.diagonal(dim1=1, dim2=2)
    floor = _FLOOR * diagonal.mean(1, keepdim=True)
    tiny = torch.finfo(diagonal.dtype).tiny ** 0.5  # a layer whose inputs are all zero
    return moments.gram + torch.diag_embed(strength * (diagonal + floor + tiny))


@dataclass(slots=True)
class Fit:
    """The correction that did best on held-out samples.

    Attributes:
        correction: ``[groups, features, outputs]``; None when every one made the held-out error larger.
        strength: Of its regularization.
        before: Mean squared error on the held-out samples without it, summed over outputs.
        after: With it (``before`` when there is none).
    """

    correction: Tensor | None
    strength: float | None
    before: float
    after: float


def fit(
    train: Moments,
    held_out: Moments,
    support: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    solve: Callable[[Moments, float, Tensor | None], Tensor] = ridge,
) -> Fit:
    """Choose the strength on held-out samples and return the correction, if it makes their error smaller.

    Args:
        train: Moments of the samples that corrections are fitted to.
        held_out: Moments of the samples they are judged on.
        support: See :func:`ridge`. The strength is then chosen on at most 32 of the outputs.
        strengths: Tried in this order, until the error grows.
        solve: Solves one problem.
    """
    before = float(held_out.square.sum()) / held_out.count
    if before <= _NOTHING * held_out.target / held_out.count:
        return Fit(None, None, before, before)
    some_train, some_held, some_support = _some_outputs(train, held_out, support)
    best, found, chosen = float(some_held.square.sum()) / some_held.count, None, None
    for strength in strengths:
        correction = solve(some_train, strength, some_support)
        error = float(squared_error(some_held, correction).sum())
        if not error < best:
            break
        best, found, chosen = error, strength, correction
    if found is None or chosen is None:
        return Fit(None, None, before, before)
    if some_train is not train:
        chosen = solve(train, found, support)
        best = float(squared_error(held_out, chosen).sum())
    if not best < before:
        return Fit(None, None, before, before)
    return Fit(chosen, found, before, best)


def _some_outputs(
    train: Moments, held_out: Moments, support: Tensor | None
) -> tuple[Moments, Moments, Tensor | None]:
    """Return the problems of some outputs only, where each output is a problem of its own."""
    outputs = train.cross.shape[2]
    if support is None or bool(support.all()) or outputs <= _MOST_TRIED_ROWS:
        return train, held_out, support
    rows = torch.linspace(0, outputs - 1, _MOST_TRIED_ROWS).round().long().unique()

    def only(moments: Moments) -> Moments:
        return Moments(
            moments.gram, moments.cross[:, :, rows], moments.square[:, rows], moments.target, moments.count
        )

    return only(train), only(held_out), support[:, :, rows]
