"""``ModelSpeedup``: masks become a smaller model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.config.granularity import weight_axes
from dwindle.graph import analyse
from dwindle.pruning.coupling import Coupling
from dwindle.realize import ShrinkResult, realize

Nested = Mapping[str, Mapping[str, Tensor | None]]


class ModelSpeedup:
    """Cuts masked channels out of a model, with proof.

    As NNI does, norms, biases and depthwise convolutions behind a masked channel are masked with it first, so that it
    emits nothing; the small model is proven equal to the model masked so.

    Args:
        model: The model, plain or masked; changed in place where its code allows it.
        dummy_input: A tensor, a tuple or list of inputs, or a dict of keyword inputs.
        masks_or_file: ``{module: {target: mask}}``, or a file with it; None takes the masks that lie on the model.
        map_location: Where a file's masks are loaded to.
        batch_dim: Taken and not needed, as are ``batch_size``, ``graph_module``, ``garbage_collect_values`` and
            ``logger``.
        batch_size: See above.
        customized_mask_updaters: Not supported; own operators get a rule with ``dw.register_axis_rule``.
        customized_replacers: Not supported, likewise.
        graph_module: See above.
        garbage_collect_values: See above.
        logger: See above.
        masks_file: The name that 2.x has for ``masks_or_file``.

    Raises:
        ConfigError: An argument is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: Nested | str | os.PathLike[str] | None = None,
        map_location: Any = None,
        batch_dim: int = 0,
        batch_size: int = 8,
        customized_mask_updaters: Any = None,
        customized_replacers: Any = None,
        graph_module: Any = None,
        garbage_collect_values: bool = True,
        logger: Any = None,
        *,
        masks_file: Nested | str | os.PathLike[str] | None = None,
    ) -> None:
        for name, given in {
            "customized_mask_updaters": customized_mask_updaters,
            "customized_replacers": customized_replacers,
        }.items():
            if given:
                raise ConfigError(f"{name}: write a rule for the operator instead, see dw.register_axis_rule")
        masks = masks_or_file if masks_or_file is not None else masks_file
        if isinstance(masks, str | os.PathLike):
            masks = torch.load(masks, map_location=map_location, weights_only=True)
        self.model, self.masks = model, masks or {}
        self.inputs: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        if isinstance(dummy_input, Mapping):
            self.keywords = dict(dummy_input)
        else:
            self.inputs = tuple(dummy_input) if isinstance(dummy_input, tuple | list) else (dummy_input,)
        self.result: ShrinkResult | None = None

    def speedup_model(self) -> nn.Module:
        """Return the small model.

        Raises:
            RealizeError: It was not proven equal to the masked one; the model is as it was.
        """
        masks = {
            Target(module, name): mask
            for module, targets in self.masks.items()
            for name, mask in targets.items()
            if mask is not None
        } or simulate.get_masks(self.model)
        before = simulate.get_masks(self.model)
        whole = completed(self.model, masks, self.inputs, self.keywords)
        simulate.attach_masks(self.model, [(target, mask, "mul", None) for target, mask in whole.items()])
        try:
            self.result = realize(self.model, self.inputs, example_kwargs=self.keywords)
        except BaseException:
            simulate.detach(self.model, keep_values=False, targets=[t for t in whole if t not in before])
            raise
        return self.result.model


def completed(
    model: nn.Module, masks: Mapping[Target, Tensor], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[Target, Tensor]:
    """Return masks together with those of what would make a wholly masked channel emit something.

    Args:
        model: The model.
        masks: By target.
        inputs: Example inputs.
        keywords: Example keyword inputs.
    """
    with simulate.disabled(model):
        coupling = Coupling(model, analyse(model, inputs, dict(keywords)))
    whole = dict(masks)
    ranked: dict[Any, dict[tuple[str, int], Tensor]] = {}
    for target, mask in masks.items():
        if not target.is_parameter or mask.dim() < 2 or not coupling.knows(target):
            continue
        dim = weight_axes(type(coupling.modules[target.module]), mask.dim())[0]
        rows = (mask.cpu() != 0).movedim(dim, 0).flatten(1).any(1)
        for info, index in coupling.axes_of(target, dim)[0]:
            here = index >= 0
            keep = torch.ones(info.size, dtype=torch.bool)
            keep[index[here]] = rows[here]
            ranked.setdefault(info, {})[(coupling.path_of(target), dim)] = keep
    for info, keeps in ranked.items():
        if any(_makes(coupling, path, dim) for path, dim in info.parameter_dims if (path, dim) not in keeps):
            continue  # another layer, which is not masked, adds to these channels
        keep = torch.stack(list(keeps.values())).any(0)
        if bool(keep.all()):
            continue
        for target, dims in coupling.followers(info, keep, set(keeps)).items():
            parameter = coupling.modules[target.module]._parameters[target.name]
            assert parameter is not None
            mask = whole.get(target, torch.ones(parameter.shape)).cpu()
            for dim, stays in dims.items():
                shape = [1] * parameter.dim()
                shape[dim] = -1
                mask = mask * stays.float().reshape(shape)
            whole[target] = mask
    return whole


def _makes(coupling: Coupling, path: str, dim: int) -> bool:
    """Return whether a parameter makes channels out of others, rather than shifts or scales them one by one."""
    parameter, module = coupling._parameter(path)
    if parameter is None or parameter.dim() < 2 or coupling.is_reader(path, dim):
        return False
    depthwise = getattr(module, "groups", 1) > 1 and parameter.shape[1] == 1
    return not depthwise
