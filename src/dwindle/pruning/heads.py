"""The pruner of attention heads: whole heads of any attention that the analysis finds, by six criteria."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config import Granularity, Target
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.granularity import activation_axis
from dwindle.pruning.coupling import READERS
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.places import Place, hook_places, inputs_of_readers
from dwindle.pruning.plan import PruningPlan
from dwindle.pruning.taylor import Gates

#: What heads are ranked by.
CRITERIA = ("l1_weight", "l2_weight", "l1_activation", "l2_activation", "taylor", "movement")


def head_norms(rows: Tensor, index: Tensor, heads: int, order: int) -> Tensor:
    """Return the norm of the part of a weight that makes each head.

    Args:
        rows: ``[rows, width]``, one row for each output of a projection.
        index: The head of each row (-1 is none). A fused projection (query, key and value in one weight) has
            several runs of rows for each head; each run is a part, and the parts' norms are averaged, as those of
            three projections are.
        heads: Number of heads.
        order: 1 or 2.

    Returns:
        ``[heads]``, float64.
    """
    wide = rows.double()
    index = index.to(wide.device)
    here = index >= 0
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[1:] = index[1:] != index[:-1]
    run = starts.long().cumsum(0) - 1
    powers = (wide.abs() if order == 1 else wide.square()).sum(1) * here
    norms = torch.zeros(int(run[-1]) + 1, dtype=wide.dtype, device=wide.device).index_add_(0, run, powers)
    norms = norms if order == 1 else norms.sqrt()
    owner = index[starts]
    real = owner >= 0
    total = torch.zeros(heads, dtype=wide.dtype, device=wide.device).index_add_(0, owner[real], norms[real])
    return total / torch.bincount(owner[real], minlength=heads).clamp(min=1)


def by_head(values: Tensor, index: Tensor, heads: int) -> Tensor:
    """Sum up values of positions, ``[..., positions]``, over the positions of each head, ``[..., heads]``."""
    index = index.to(values.device)
    here = index >= 0
    total = torch.zeros(*values.shape[:-1], heads, dtype=values.dtype, device=values.device)
    return total.index_add_(-1, index[here], values[..., here])


class TransformerHeadPruner(ObservingPruner):
    """The least important heads go, whole, with all their projections.

    ``criterion`` names the importance of a head:

    - ``l1_weight``: mean of the L1 norms of its query, key and value projections (those in the config)
    - ``l2_weight``: the same with L2 norms
    - ``l1_activation``: mean over samples of the L1 norm of what it gives to the output projection
    - ``l2_activation``: the same with L2 norms
    - ``taylor``: mean over samples of ``|dL/dz|`` for a gate ``z = 1`` on the head (Michel et al.,
      arXiv:1905.10650, equation 2)
    - ``movement``: ``- sum g w`` over its projections, a mean over optimizer steps: heads whose weights move
      towards zero go (Sanh et al., arXiv:2005.07683, equation 5)

    Every attention counts that the analysis of the model recognizes (axes of kind ``heads``), whatever its class:
    fused projections, ``nn.MultiheadAttention``, grouped queries (then a head is one of the keys', with all its
    queries). No attention is ever left without a head, unless ``allow_empty`` asks for it.

    Where the output projection is no module that is called (``nn.MultiheadAttention``), ``taylor`` takes the
    gradient of the gate from that projection's weight, in which a batch counts as one sample; activations cannot
    be seen there.

    Args:
        model: The model.
        config_list: As in :class:`Pruner`; layers without heads are left alone. A number prunes this share of the
            heads of every attention.
        example_inputs: As in :class:`Pruner`; heads cannot be found without them.
        example_kwargs: As in :class:`Pruner`.
        criterion: See the table. Norms of weights need nothing; movement needs a training run (or a schedule); the
            others need ``data``, a training run or a schedule.
        scope: ``local`` takes the same share of each attention; ``global`` ranks all heads together.
        normalize: Divide the scores of each attention by their Euclidean norm (Michel et al. do, for a global
            ranking by Taylor scores).
        allow_empty: Whether an attention may lose all its heads.
        observation: ``data``, ``loss``, ``batches``, ``adapt`` or ``training_steps``, as in
            :class:`ObservingPruner`.

    Raises:
        ConfigError: An argument is not valid.
    """

    works_sharded = False

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]] | float,
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        criterion: Literal[
            "l1_weight", "l2_weight", "l1_activation", "l2_activation", "taylor", "movement"
        ] = "l1_weight",
        scope: Literal["local", "global"] = "local",
        normalize: bool = False,
        allow_empty: bool = False,
        **observation: Any,
    ) -> None:
        for name, value, choices in (
            ("criterion", criterion, CRITERIA),
            ("scope", scope, ("local", "global")),
        ):
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}{hint}")
        self.criterion, self.scope = criterion, scope
        self.normalize, self.allow_empty = normalize, allow_empty
        self.needs_observation = not criterion.endswith("_weight")
        self.needs_gradients = criterion in ("taylor", "movement")
        entries = (
            _every_projection(model, config_list) if isinstance(config_list, int | float) else config_list
        )
        super().__init__(model, entries, example_inputs, example_kwargs, **observation)
        if self._inputs is None:
            raise ConfigError("TransformerHeadPruner needs example_inputs, from which the heads are found")
        if criterion == "movement" and self.data is not None:
            raise ConfigError(
                "movement is seen in a training run only; give training_steps= in place of data="
            )
        if not self.needs_observation and (self.data is not None or self.training_steps is not None):
            raise ConfigError(f"criterion {criterion!r} looks at weights only; it takes no data and no steps")
        self.plan = self._with_heads(self.plan)
        self._axes: dict[int, tuple[Any, list[Place]]] = {}
        self._gates = Gates()

    def check(self, target: Target, granularity: Granularity) -> None:
        """Refuse blocks that are no output channels.

        Raises:
            ConfigError: Saying so.
        """
        if granularity.kind != "channel":
            raise ConfigError(f"{target}: heads are output channels; use granularity 'out_channel'")

    def _with_heads(self, plan: PruningPlan) -> PruningPlan:
        """Return the plan with what this pruner adds to every setting."""
        goals = {}
        for target, planned in plan.goals.items():
            setting = planned.setting
            if setting.axes is not None and "heads" not in setting.axes:
                raise ConfigError(f"{target}: TransformerHeadPruner prunes heads, but axes is {setting.axes}")
            changes: dict[str, Any] = {"axes": ("heads",)}
            if self.allow_empty:
                changes["max_sparse_ratio"] = (
                    setting.max_sparse_ratio or 1.0
                )  # a global ranking keeps one otherwise
            else:
                changes["minimum"] = max(setting.minimum, 1)
            if self.scope == "global" and setting.global_group_id is None:
                changes["global_group_id"] = "heads"
            goals[target] = replace(planned, setting=setting.model_copy(update=changes))
        return PruningPlan({**plan.settings, **{t: own.setting for t, own in goals.items()}}, goals)

    def analysed(self) -> None:
        """Keep the targets that make heads, and note where the heads are read.

        Raises:
            ConfigError: None of them makes heads.
        """
        goals = {target: own for target, own in self.plan.goals.items() if self._heads_of(target)}
        if not goals:
            raise ConfigError(
                "no configured layer makes heads that may go; `dwindle inspect` shows what the analysis found"
            )
        self.plan = PruningPlan(self.plan.settings, goals)
        assert self._coupling is not None
        for target in goals:
            for info, _ in self._heads_of(target):
                self._axes.setdefault(info.id, (info, inputs_of_readers(self._coupling, info)))
                if self.criterion.endswith("_activation") and not self._axes[info.id][1]:
                    raise ConfigError(
                        f"{target}: what its heads give cannot be seen, because no module that is called reads it "
                        "(nn.MultiheadAttention?); use criterion 'taylor' or 'l2_weight'"
                    )

    def _heads_of(self, target: Target) -> list[tuple[Any, Tensor]]:
        """Return the axes of heads among a target's output channels, with the head of each channel."""
        planned, coupling = self.plan.goals[target], self._coupling
        if coupling is None or planned.granularity.groups != 1 or not coupling.knows(target):
            return []
        members, _ = coupling.axes_of(target, planned.granularity.axis % len(planned.shape))
        return [(info, index) for info, index in members if info.kind == "heads"]

    # What is observed.

    def watch(self) -> Iterator[RemovableHandle]:
        """Look at what the heads give to the output projections, where that is needed."""
        if self.criterion not in ("l1_activation", "l2_activation", "taylor"):
            return
        self._gates = Gates(forgiving=not self._own_pass)
        see = self._gate if self.criterion == "taylor" else self._see
        places = [place for _, own in self._axes.values() for place in own]
        yield from hook_places(self.model, [place.target for place in places], see)

    def _gate(self, target: Target, value: Tensor) -> Tensor | None:
        if not (self.observing and torch.is_grad_enabled()):
            return None
        return self._gates.on(target, value, activation_axis(type(self.model.get_submodule(target.module))))

    def _see(self, target: Target, value: Tensor) -> None:
        if not self.observing:
            return
        axis = activation_axis(type(self.model.get_submodule(target.module)))
        channels = value.detach().double().movedim(axis, -1).reshape(value.shape[0], -1, value.shape[axis])
        for info, places in self._axes.values():
            for place in places:
                if place.target == target and place.index is not None:
                    norms = self._activation_norms(channels, place.index, info.size)
                    self.add(_key(info), norms.sum(0), channels.shape[0])

    def _activation_norms(self, channels: Tensor, index: Tensor, heads: int) -> Tensor:
        """Return the norm of each head's part of each sample, ``[samples, heads]``."""
        if self.criterion == "l1_activation":
            return by_head(channels.abs().sum(1), index, heads)
        return by_head(channels.square().sum(1), index, heads).sqrt()

    def gradients(self) -> None:
        """Add the scores of one batch, or of one optimizer step."""
        if self.criterion == "movement":
            for target, weight in self.collect().items():
                gradient = self.gradient_of(target)
                if gradient is not None:
                    self.add(target, self._rows(target, -(gradient * weight).double()).sum(1))
            return
        taken = self._gates.take()
        for info, places in self._axes.values():
            found = [(torch.cat(taken[p.target]), p.index) for p in places if taken.get(p.target)]
            parts = [by_head(own, index, info.size) for own, index in found if index is not None]
            if parts and len({own.shape[0] for own in parts}) == 1:
                samples = torch.stack(parts).sum(0)
                self.add(_key(info), samples.abs().sum(0) * samples.shape[0], samples.shape[0])
            elif not places:
                self._add_of_weights(info)

    def _add_of_weights(self, info: Any) -> None:
        """Add the gate's gradient as the output projection's weight has it: ``sum g w`` over a head's columns."""
        assert self._coupling is not None
        total: Tensor | None = None
        for path, dim in info.parameter_dims:
            module, _, name = path.rpartition(".")
            target = Target(module, name)
            if not self._coupling.is_reader(path, dim):
                continue
            gradient = self.gradient_of(target)
            if gradient is not None:
                weight = self.model.get_submodule(module)._parameters[name]
                product = (gradient * weight).detach().double().movedim(dim, -1).flatten(0, -2).sum(0)  # type: ignore[operator]
                own = by_head(product, self._coupling.analysis.positions(path, dim)[info.axis], info.size)
                total = own if total is None else total + own
        if total is not None:
            self.add(_key(info), total.abs())

    # The metric.

    def metric(self, target: Target, weight: Tensor, granularity: Granularity) -> Tensor:
        """Return a number for each output channel whose sum over a head is the head's importance."""
        metric = torch.zeros(granularity.block_shape(weight.shape), dtype=torch.float64, device=weight.device)
        for info, index in self._heads_of(target):
            index = index.to(weight.device)
            scores = self._scores(target, weight, info, index)
            if self.normalize:
                scores = scores / torch.linalg.vector_norm(scores).clamp(min=1e-30)
            here = index >= 0
            rows = torch.bincount(index[here], minlength=info.size).clamp(min=1)
            metric[here] = (scores.to(weight.device) / rows)[index[here]]
        return metric

    def _scores(self, target: Target, weight: Tensor, info: Any, index: Tensor) -> Tensor:
        if self.criterion == "movement":
            return by_head(self.mean(target), index, info.size)
        if self.needs_observation:
            return self.mean(_key(info))
        return head_norms(self._rows(target, weight), index, info.size, int(self.criterion[1]))

    def _rows(self, target: Target, weight: Tensor) -> Tensor:
        axis = self.plan.goals[target].granularity.axis
        return weight.movedim(axis, 0).flatten(1) if weight.dim() > 1 else weight[:, None]


def _key(info: Any) -> Target:
    """Return the name under which the statistics of an axis stand: the first parameter on it, and its number."""
    return Target(info.parameter_dims[0][0], f"heads_{info.id}")


def _every_projection(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """Return a config_list that gives every layer with a weight this ratio; those without heads drop out later."""
    if isinstance(ratio, bool) or not 0 <= ratio <= 1:
        raise ConfigError(f"config_list: {ratio!r} is not a share between 0 and 1, nor a list of entries")
    names = [
        name
        for name, module in model.named_modules()
        if {base.__name__ for base in type(module).__mro__}.intersection(READERS)
        and any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())
    ]
    if not names:
        raise ConfigError("the model has no layer with a weight that could make heads")
    return [{"op_names": names, "sparse_ratio": float(ratio), "granularity": "out_channel"}]
