"""Torch-Pruning and NNCF on the same models, to the same MACs or the same sparsity, with the same fine-tuning.

Both are optional: ``pip install --no-deps torch-pruning==1.6.1`` and ``pip install --no-deps nncf tabulate torchao``.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from contest.methods import TOLERANCE, Method, macs_share
from contest.tasks import Task
from dwindle import pruning
from dwindle.measure.macs import count_macs
from dwindle.training.batches import logits_of, move_batch, split_batch


def _loss(model: nn.Module, batch: Any) -> Tensor:
    args, kwargs, target = split_batch(move_batch(batch, "cpu"))
    return functional.cross_entropy(logits_of(model(*args, **kwargs)), target)


def _gradients(task: Task, model: nn.Module) -> list[Tensor]:
    """Gradients of the mean loss over the calibration data."""
    model.zero_grad()
    for batch in task.calibration:
        (_loss(model, batch) / len(task.calibration)).backward()
    return _take(model)


def _squared_gradients(task: Task, model: nn.Module) -> list[Tensor]:
    """Means of the squared gradients of single samples."""
    from dwindle.pruning.second_order import samples_of

    total = [torch.zeros_like(own) for own in model.parameters()]
    count = 0
    for batch in task.calibration:
        for sample in samples_of(batch):
            model.zero_grad()
            _loss(model, sample).backward()
            count += 1
            for whole, own in zip(total, _take(model), strict=True):
                whole += own.square()
    return [own / count for own in total]


def _take(model: nn.Module) -> list[Tensor]:
    taken = [torch.zeros_like(own) if own.grad is None else own.grad.clone() for own in model.parameters()]
    model.zero_grad()
    return taken


def torch_pruning(
    name: str,
    make: Callable[[Any], Any],
    scope: str,
    gradients: Callable[[Task, nn.Module], list[Tensor]] | None = None,
) -> Method:
    """One importance of Torch-Pruning; its ratio is found by bisection so that the MACs agree.

    Args:
        name: What it is called.
        make: Makes the importance from the library's module of importances.
        scope: ``local``, ``global`` or ``isomorphic``.
        gradients: What it wants in the parameters' ``grad``.
    """

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        import torch_pruning as tp

        found = None if gradients is None else gradients(task, model)
        whole = count_macs(model, task.examples)
        low, high, best, gap = 0.0, 1.0, None, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            small = _cut(tp, task, model, make(tp.importance), middle, scope, found)
            share = macs_share(small, task, whole)
            if abs(share - (1 - ratio)) < gap:
                best, gap = small, abs(share - (1 - ratio))
            if gap < 0.002:
                break
            low, high = (middle, high) if share > 1 - ratio else (low, middle)
        if best is None or gap > TOLERANCE:
            raise ValueError(f"the MACs cannot be brought to {1 - ratio:.0%} (nearest: {gap:.1%} away)")
        before = task.accuracy(best)
        return task.tune(best, seed), before

    return Method(f"{name}, {scope}", "torch-pruning", "structured", run)


def _cut(
    tp: Any,
    task: Task,
    model: nn.Module,
    importance: Any,
    ratio: float,
    scope: str,
    gradients: list[Tensor] | None,
) -> nn.Module:
    """Prune a copy by Torch-Pruning's own ratio."""
    small = copy.deepcopy(model).eval()
    for parameter, gradient in zip(small.parameters(), gradients or [None] * 10**6, strict=False):
        parameter.grad = None if gradient is None else gradient.clone()
    options: dict[str, Any] = {
        "importance": importance,
        "pruning_ratio": ratio,
        "global_pruning": scope != "local",
        "isomorphic": scope == "isomorphic",
        "max_pruning_ratio": 0.95,
    }
    attentions = [
        module
        for module in small.modules()
        if hasattr(module, "num_attention_heads") and hasattr(module, "query")
    ]
    if attentions:
        inner = {own for name, own in small.named_modules() if name.endswith("intermediate.dense")}
        chosen = inner | {layer for own in attentions for layer in (own.query, own.key, own.value)}
        options["ignored_layers"] = [
            own
            for own in small.modules()
            if isinstance(own, nn.Linear | nn.LayerNorm | nn.Embedding) and own not in chosen
        ]
        heads = {
            layer: own.num_attention_heads for own in attentions for layer in (own.query, own.key, own.value)
        }
        options |= {
            "num_heads": heads,
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": ratio,
        }
    else:
        options["ignored_layers"] = [small.head]
    pruner = tp.pruner.BasePruner(small, task.examples, **options)
    pruner.step()
    for own in attentions:  # as its own examples do by hand
        own.num_attention_heads = pruner.num_heads[own.query]
        own.all_head_size = own.query.out_features
    small.zero_grad()
    return small


def torch_pruning_sparse_first() -> Method:
    """Its GroupNormPruner with sparse learning over half of the budget, then the other half."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        import torch_pruning as tp

        first = max(1, task.tuning // 2)
        pruner = tp.pruner.GroupNormPruner(
            model, task.examples, importance=tp.importance.GroupMagnitudeImportance(p=2), reg=5e-4,
            global_pruning=True, ignored_layers=[model.head],
        )  # fmt: skip
        task.tune(model, seed, [_Regularizer(model, pruner)], epochs=first)
        plain = torch_pruning(
            "group norm", lambda importance: importance.GroupMagnitudeImportance(p=2), "global"
        )
        halves = copy.copy(task)
        halves.tuning = max(1, task.tuning - first)
        return plain.run(halves, model, ratio, seed + 1)

    return Method(
        "sparse learning, then group norm", "torch-pruning", "structured", run, ("digits", "fashion")
    )


class _Regularizer:
    """Its regularizer adds to gradients, just before the optimizer uses them."""

    def __init__(self, model: nn.Module, pruner: Any) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self.model, self.pruner = model, pruner
        self.handle = register_optimizer_step_pre_hook(lambda *given: self.pruner.regularize(self.model))

    def step(self) -> None:
        """Nothing to do."""

    def loss(self) -> float:
        """Nothing to add."""
        return 0.0

    def parameters(self) -> Any:
        """No parameters of its own."""
        return iter(())

    def detach(self) -> None:
        """Stop."""
        self.handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


def nncf_magnitude(scope: str, *, scheduled: bool) -> Method:
    """NNCF's magnitude pruning, at once or with its exponential schedule over half of the epochs."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        import nncf
        from nncf.torch.function_hook.pruning.magnitude.schedulers import ExponentialMagnitudePruningScheduler

        mode = getattr(nncf.PruneMode, f"UNSTRUCTURED_MAGNITUDE_{scope.upper()}")
        share = 0.0 if scheduled else ratio
        model = nncf.prune(
            model, mode, ratio=share, ignored_scope=_no_embeddings(), examples_inputs=task.examples
        )
        if not scheduled:
            before = task.accuracy(model)
            task.tune(model, seed)
            return _stripped(model), before
        half = max(1, task.tuning // 2)
        schedule = ExponentialMagnitudePruningScheduler(
            model, mode=mode, initial_ratio=0.0, target_ratio=ratio, target_epoch=half
        )
        task.tune(model, seed, [_ByEpoch(schedule, task.batches)])
        return _stripped(model), None

    return Method(f"magnitude, {scope}{', scheduled' if scheduled else ''}", "nncf", "unstructured", run)


class _ByEpoch:
    """Steps one of NNCF's schedules at the end of each epoch, as its examples do."""

    def __init__(self, schedule: Any, batches: int, loss: Any = None, masks: Sequence[Any] = ()) -> None:
        self.schedule, self.batches, self.own_loss, self.masks = schedule, batches, loss, masks
        self.steps = 0
        self.rate = 0.0
        schedule.step()

    def step(self) -> None:
        """Count steps."""
        self.steps += 1
        if self.steps % self.batches == 0:
            self.schedule.step()

    def loss(self) -> Any:
        """Its loss, where it has one."""
        return 0.0 if self.own_loss is None else self.own_loss()

    def parameters(self) -> Any:
        """The trained logits."""
        return iter(self.masks)

    def parameter_options(self) -> dict[str, Any]:
        """The optimizer and learning rate that dwindle gives its own logits by default."""
        return {"weight_decay": 0.0, "adaptive": True, "lr": self.rate}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


def nncf_rb() -> Method:
    """NNCF's regularization-based pruning with its loss and schedule; its logits are trained as dwindle's are."""

    def run(task: Task, model: nn.Module, ratio: float, seed: int) -> tuple[nn.Module, float | None]:
        import nncf
        from nncf.torch.function_hook.pruning.rb.losses import RBLoss
        from nncf.torch.function_hook.pruning.rb.schedulers import ExponentialRBPruningScheduler

        torch.manual_seed(seed)
        mode = nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED
        model = nncf.prune(model, mode, ignored_scope=_no_embeddings(), examples_inputs=task.examples)
        loss = RBLoss(model, target_ratio=ratio).train()
        half = max(1, task.tuning // 2)
        schedule = ExponentialRBPruningScheduler(
            loss, initial_ratio=0.01, target_ratio=ratio, target_epoch=half
        )
        masks = [own for name, own in model.named_parameters() if name.endswith(".mask")]
        stepped = _ByEpoch(schedule, task.batches, loss, masks)
        stepped.rate = pruning.RBPruner.default_rate(half * task.batches)
        task.tune(model, seed, [stepped])
        if any(isinstance(own, nn.BatchNorm2d) for own in model.modules()):
            images = nncf.Dataset([batch[0] for batch in task.calibration])
            model = nncf.batch_norm_adaptation(model, images)
        return _stripped(model), None

    return Method("RB", "nncf", "unstructured", run)


def _no_embeddings() -> Any:
    """The same weights for all tools: those of convolutions and linear layers, not the tables that NNCF adds."""
    import nncf

    return nncf.IgnoredScope(types=["embedding"], validate=False)


def _stripped(model: nn.Module) -> nn.Module:
    import nncf

    return nncf.strip(model, do_copy=False, strip_format=nncf.StripFormat.IN_PLACE)


def peer_methods() -> list[Method]:
    """What is installed of the two tools."""
    found: list[Method] = []
    if importlib.util.find_spec("torch_pruning"):
        for scope in ("local", "global"):
            found += [
                torch_pruning("magnitude L1", lambda own: own.GroupMagnitudeImportance(p=1), scope),
                torch_pruning("group norm", lambda own: own.GroupMagnitudeImportance(p=2), scope),
                torch_pruning("Taylor", lambda own: own.GroupTaylorImportance(), scope, _gradients),
                torch_pruning("Hessian", lambda own: own.GroupHessianImportance(), scope, _squared_gradients),
            ]
        found += [
            torch_pruning("group norm", lambda own: own.GroupMagnitudeImportance(p=2), "isomorphic"),
            torch_pruning("Taylor", lambda own: own.GroupTaylorImportance(), "isomorphic", _gradients),
            torch_pruning("LAMP", lambda own: own.LAMPImportance(), "global"),
            torch_pruning("FPGM", lambda own: own.FPGMImportance(), "local"),
            torch_pruning_sparse_first(),
        ]
    if importlib.util.find_spec("nncf"):
        found += [nncf_magnitude(scope, scheduled=False) for scope in ("local", "global")]
        found += [nncf_magnitude(scope, scheduled=True) for scope in ("local", "global")]
        found.append(nncf_rb())
    return found
