"""Pruners of NNI 2.x that act all through a training: Slim, ADMM, Movement."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dwindle import pruning
from dwindle.compat.nni.compressor import UNTIL_THE_END
from dwindle.compat.nni.v2.compressor import ConfigList, Pruner, with_mode
from dwindle.compat.nni.v2.evaluator import read_arguments
from dwindle.config import resolve
from dwindle.config.errors import ConfigError

_OLD = ["trainer", "traced_optimizer", "criterion"]


class SlimPruner(Pruner):
    """Channels whose batch norm scale an L1 penalty has pushed towards zero go.

    Arguments: ``model, config_list, evaluator, training_epochs, scale=0.0001, mode='global'``, or with ``trainer,
    traced_optimizer, criterion`` in place of the evaluator.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        tail = ["training_epochs", "scale", "mode"]
        given = read_arguments(
            ["evaluator", *tail], [*_OLD, *tail], {"scale": 0.0001, "mode": "global"}, args, kwargs
        )
        super().__init__(model, config_list, given["evaluator"])
        entries, more = with_mode(config_list, given["mode"], None)
        self.own_epochs = given["training_epochs"]
        self.inner = pruning.SlimPruner(
            model, entries, training_steps=UNTIL_THE_END, regular_scale=given["scale"], **more
        )


class _IteratedADMM(pruning.ADMMPruner):
    """Renews Z and U when it is told to, rather than after a number of steps."""

    def advance(self) -> None:
        """Nothing after a step."""

    def iterate(self) -> None:
        """Renew Z and U."""
        super().advance()


class ADMMPruner(Pruner):
    """Weights are pulled towards sparse ones in iterations of training; then the smallest go.

    Arguments: ``model, config_list, evaluator, iterations, training_epochs, granularity='fine-grained'``, or with
    ``trainer, traced_optimizer, criterion`` in place of the evaluator. ``granularity`` is ``fine-grained`` (single
    weights) or ``coarse-grained`` (output channels). An entry's ``rho`` weighs the penalty of its layers, 1e-4 unless
    given; the penalty is the paper's, ``rho / 2 * ||W - Z + U||**2``.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        tail = ["iterations", "training_epochs", "granularity"]
        given = read_arguments(
            ["evaluator", *tail], [*_OLD, *tail], {"granularity": "fine-grained"}, args, kwargs
        )
        super().__init__(model, config_list, given["evaluator"])
        kinds = {"fine-grained": None, "coarse-grained": "out_channel"}
        if given["granularity"] not in kinds:
            raise ConfigError(f"granularity {given['granularity']!r} is not one of {', '.join(kinds)}")
        if given["iterations"] < 1:
            raise ConfigError(f"iterations must be positive, got {given['iterations']}")
        self.iterations, self.own_epochs = given["iterations"], given["training_epochs"]
        kind = type("ADMM", (_IteratedADMM,), {"default_granularity": kinds[given["granularity"]]})
        entries, rho = _without_rho(model, config_list)
        self.inner = kind(model, entries, training_steps=UNTIL_THE_END, interval_steps=1, rho=rho)

    def _work(self, max_steps: int | None, max_epochs: int | None) -> None:
        inner = self.inner
        if self.evaluator is None or not isinstance(inner, _IteratedADMM):
            raise ConfigError("ADMMPruner needs an evaluator to train")
        try:
            inner.attach()
            for _ in range(self.iterations):
                self.evaluator.train(self.bound_model, [inner], None, self.own_epochs)
                inner.iterate()
            inner.finish()
        except BaseException:
            inner.detach(keep_values=False)
            raise
        self._finished()


def _without_rho(model: nn.Module, config_list: ConfigList) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the entries without ``rho``, and it by module name."""
    entries = [{key: value for key, value in entry.items() if key != "rho"} for entry in config_list]
    rho: dict[str, float] = {}
    for given, entry in zip(config_list, entries, strict=True):
        if entry.get("exclude"):
            continue
        for target in resolve(model, [entry], "pruning"):
            rho[target.module] = float(given.get("rho", 1e-4))
    goals = pruning.LevelPruner(model, entries).plan.goals
    modules = {target.module for target in goals}
    return entries, {name: value for name, value in rho.items() if name in modules}


class MovementPruner(Pruner):
    """Weights that moved towards zero go; masks follow the scores until the training ends.

    Arguments: ``model, config_list, evaluator, warm_up_step, cool_down_beginning_step, training_epochs=None,
    training_steps=None, regular_scale=None, movement_mode='hard', sparse_granularity='finegrained'``, or ``trainer,
    traced_optimizer, criterion, training_epochs, warm_up_step, cool_down_beginning_step`` after the config. In mode
    ``soft`` the config's ``sparsity`` is the threshold of the scores. ``sparse_granularity='auto'`` prunes the
    projections of attentions in blocks of the head width, and the rows and columns of the layers between them.
    """

    def __init__(self, model: nn.Module, config_list: ConfigList, *args: Any, **kwargs: Any) -> None:
        given = read_arguments(
            [
                "evaluator",
                "warm_up_step",
                "cool_down_beginning_step",
                "training_epochs",
                "training_steps",
                "regular_scale",
                "movement_mode",
                "sparse_granularity",
            ],
            [*_OLD, "training_epochs", "warm_up_step", "cool_down_beginning_step"],
            {
                "training_epochs": None,
                "training_steps": None,
                "regular_scale": None,
                "movement_mode": "hard",
                "sparse_granularity": "finegrained",
            },
            args,
            kwargs,
        )
        super().__init__(model, config_list, given["evaluator"])
        warmup, cooldown = given["warm_up_step"], given["cool_down_beginning_step"]
        if not 0 <= warmup < cooldown:
            raise ConfigError(f"warm_up_step {warmup} must be below cool_down_beginning_step {cooldown}")
        if given["training_epochs"] is None and given["training_steps"] is None:
            raise ConfigError("give training_epochs or training_steps")
        self.cooldown_begin_step = cooldown
        self.own_epochs, self.own_steps = given["training_epochs"], given["training_steps"]
        self.inner = pruning.MovementPruner(
            model,
            _movement_config(model, config_list, given["movement_mode"], given["sparse_granularity"]),
            training_steps=UNTIL_THE_END,
            warmup_steps=warmup,
            cooldown_steps=UNTIL_THE_END - cooldown,
            regular_scale=1.0 if given["regular_scale"] is None else given["regular_scale"],
            learning_rate=1e-2,
        )

    def _end(self, steps: int) -> None:
        if steps < self.cooldown_begin_step:
            raise ConfigError(
                f"the training ended after {steps} steps, before cool_down_beginning_step "
                f"{self.cooldown_begin_step}; nothing is masked"
            )
        super()._end(steps)


def _movement_config(
    model: nn.Module, config_list: ConfigList, mode: str, granularity: str
) -> list[dict[str, Any]]:
    """Return entries of the modern form for the modes and granularities of 2.10."""
    for name, value, choices in (
        ("movement_mode", mode, ("hard", "soft")),
        ("sparse_granularity", granularity, ("finegrained", "auto")),
    ):
        if value not in choices:
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(choices)}")
    if mode == "hard" and granularity == "finegrained":
        return [dict(entry) for entry in config_list]
    plan = pruning.LevelPruner(model, config_list).plan
    modules = dict(model.named_modules())
    entries = []
    for target, planned in plan.goals.items():
        goal = "sparse_threshold" if mode == "soft" else "sparse_ratio"
        entry: dict[str, Any] = {
            "op_names": [target.module],
            "target_names": [target.name],
            goal: planned.setting.goal,
        }
        if granularity == "auto":
            entry["granularity"] = _blocks(
                model, target.module, modules[target.module]._parameters[target.name]
            )
        entries.append(entry)
    return entries


def _blocks(model: nn.Module, path: str, weight: Tensor | None) -> Any:
    """Return the granularity of a layer of a Hugging Face transformer."""
    config = getattr(model, "config", None)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if hidden is None or heads is None:
        raise ConfigError(
            "sparse_granularity='auto' needs a model with config.hidden_size and num_attention_heads"
        )
    if weight is not None and weight.shape[0] == weight.shape[1] == hidden:
        return [hidden // heads, hidden // heads]
    return "out_channel" if weight is not None and weight.shape[0] > weight.shape[1] else "in_channel"
