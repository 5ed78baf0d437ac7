"""GPTQ: columns are rounded one after the other, and later columns make up for the error. Pure functions.

With U the upper Cholesky factor of the inverse of ``X X'``, the error of column i over ``U[i, i]`` times ``U[i, i:]``
is what later columns take on (Frantar et al., arXiv:2210.17323, equation 2 in the form of their section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dwindle.quantization.weight_only.groups import (
    GroupFormat,
    fitted_parameters,
    group_parameters,
    split,
)
from dwindle.training.linear_layers import inverse_factor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    form: GroupFormat,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    fit: bool = False,
    zeros: Tensor | None = None,
    stripe: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels, scales and zero points whose product with the inputs is near that of the weights.

    The scales of a group are set when its turn comes, from the weights as they are then; with ``act_order`` at the
    beginning, since the columns of a group are then not rounded together.

    Args:
        weight: ``[rows, columns]``, floating; not changed.
        hessian: ``X X'`` of the layer's inputs (or its mean), ``[columns, columns]``, of the same dtype.
        form: The levels.
        damping: Share of the mean of the diagonal that is added to the diagonal.
        act_order: Round the columns with the largest inputs first.
        fit: Choose ranges of least squared error instead of the whole ones.
        zeros: Bool, ``[rows, columns]``: entries that are zero and stay so, while later columns make up for the weight
            that would have been there (the step that SparseGPT, arXiv:2301.00774, shares with GPTQ).
        stripe: Columns that are worked on before the later ones are brought up to date (changes nothing but speed).

    Returns:
        Levels ``[rows, columns]``, scales and zero points ``[rows, count]``, all in the dtype of ``weight``.

    Raises:
        DwindleError: ``X X'`` cannot be inverted.
    """
    columns = weight.shape[1]
    width = form.width(columns)
    find = fitted_parameters if fit else group_parameters
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is None:
        rest, scale, zero = weight.t().clone(), None, None
        owners = torch.arange(columns, device=weight.device) // width
    else:
        scale, zero = find(split(weight, form), form)
        rest = weight.t()[order].contiguous()
        hessian = hessian[order][:, order]
        owners = order // width
    factor = inverse_factor(hessian, damping)
    state = _State(rest, factor, owners.tolist(), form)
    if zeros is not None:
        state.kept = zeros.t() if order is None else zeros.t()[order]
    if scale is not None and zero is not None:
        state.scale, state.zero = scale.t().contiguous(), zero.t().contiguous()
    for begin, end in _stripes(columns, width, stripe):
        if order is None:
            state.settle(begin, end, find)
        else:
            state.settle(begin, end, None)
    levels = state.levels
    if order is not None:
        levels = torch.empty_like(levels).index_copy_(0, order, levels)
    return levels.t().contiguous(), state.scale.t().contiguous(), state.zero.t().contiguous()


class _State:
    """A matrix half rounded; everything is transposed, so that what is worked on lies together in memory."""

    def __init__(self, rest: Tensor, factor: Tensor, owners: list[int], form: GroupFormat) -> None:
        self.rest, self.factor, self.owners, self.form = rest, factor, owners, form
        self.levels = torch.empty_like(rest)
        self.scale = rest.new_ones(form.count(len(rest)), rest.shape[1])
        self.zero = torch.zeros_like(self.scale)
        self.kept: Tensor | None = None

    def settle(self, begin: int, end: int, find: object) -> None:
        """Round the columns of a stripe; ``find`` sets the scales where a group begins, None leaves them."""
        part, errors = self.rest[begin:end], self.rest.new_empty(end - begin, self.rest.shape[1])
        factor = self.factor[begin:end, begin:end]
        width = self.form.width(len(self.rest))
        for i, column in enumerate(part):
            place = begin + i
            group = self.owners[place]
            if callable(find) and place % width == 0:
                values = self.rest[place : place + width]
                if self.kept is not None:
                    values = values.masked_fill(self.kept[place : place + width], 0.0)
                scale, zero = find(values.t().unsqueeze(1), self.form)
                self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]
            scale, zero = self.scale[group], self.zero[group]
            level = (column / scale).round_().add_(zero).clamp_(0, self.form.highest)
            if self.kept is not None:
                level = torch.where(self.kept[place], zero, level)
            self.levels[place] = level
            errors[i] = (column - (level - zero) * scale) / factor[i, i]
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        self.rest[end:].addmm_(self.factor[begin:end, end:].t(), errors, alpha=-1)


def _stripes(columns: int, width: int, stripe: int) -> Iterator[tuple[int, int]]:
    """Yield stripes such that a group begins with a stripe or lies in one, and so is up to date when it begins."""
    if width <= stripe:
        step = stripe // width * width
        for begin in range(0, columns, step):
            yield begin, min(begin + step, columns)
        return
    for group in range(0, columns, width):
        last = min(group + width, columns)
        for begin in range(group, last, stripe):
            yield begin, min(begin + stripe, last)
