"""The methods by name: from a matrix, and what is known of its inputs, to levels, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.quantization.weight_only.gptq import gptq
from dwindle.quantization.weight_only.groups import (
    GroupFormat,
    fitted_parameters,
    group_parameters,
    merge,
    split,
    to_levels,
)
from dwindle.quantization.weight_only.hqq import hqq

METHODS = ("rtn", "hqq", "gptq", "awq")
WITH_DATA = ("gptq", "awq")


@dataclass(frozen=True)
class Method:
    """What is asked for.

    Attributes:
        name: One of :data:`METHODS`.
        act_order: GPTQ rounds the columns with the largest inputs first.
        damping: Of GPTQ.
        fit: Choose ranges of least squared error (with known inputs: of their mean squares times the error).
        keep_zeros: Every weight that is exactly zero stays so, not only those of masks.
    """

    name: str = "gptq"
    act_order: bool = True
    damping: float = 0.1
    fit: bool = False
    keep_zeros: bool = False


Rounded = tuple[Tensor, Tensor, Tensor]


def round_matrix(
    weight: Tensor,
    form: GroupFormat,
    method: Method,
    hessian: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Rounded:
    """Return levels ``[rows, columns]``, scales and zero points ``[rows, count]`` of a matrix.

    Args:
        weight: ``[rows, columns]``, floating (with AWQ's scales in it already).
        form: The levels.
        method: How.
        hessian: Mean of ``X' X`` of the inputs; None where nothing is known of them (GPTQ then is plain rounding).
        zeros: Bool, ``[rows, columns]``: zeros that stay (all methods but GPTQ keep every zero anyway).
    """
    if method.name == "gptq" and hessian is not None:
        return gptq(
            weight,
            hessian,
            form,
            damping=method.damping,
            act_order=method.act_order,
            fit=method.fit,
            zeros=zeros,
        )
    if method.name == "hqq":
        return _in_whole_groups(weight, form, lambda groups: hqq(groups, form))
    if not method.fit:
        return _in_whole_groups(weight, form, lambda groups: group_parameters(groups, form))
    importance = None if hessian is None else split(hessian.diagonal()[None], form)[0]
    groups = split(weight, form)
    scale, zero = fitted_parameters(groups, form, importance)
    return merge(to_levels(groups, scale, zero, form), weight.shape[1]), scale, zero


def _in_whole_groups(
    weight: Tensor, form: GroupFormat, find: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Rounded:
    """Apply a function of groups; a shorter group at the end of the rows is not filled up for it."""
    rows, columns = weight.shape
    width = form.width(columns)
    whole = columns // width * width
    levels, scales, zeros = [], [], []
    for part, size in ((weight[:, :whole], width), (weight[:, whole:], columns - whole)):
        if not size:
            continue
        groups = part.reshape(rows, -1, size)
        scale, zero = find(groups)
        levels.append(to_levels(groups, scale, zero, form).flatten(1))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(levels, 1), torch.cat(scales, 1), torch.cat(zeros, 1)
