"""``dw.factorize``: layers become chains of smaller ones, in place, with proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import FactorizationSetting, history
from dwindle.config.errors import ConfigError, FileFormatError, RealizeError
from dwindle.config.schema import validate
from dwindle.factorization.factors import factors
from dwindle.factorization.forms import form_of, full_ranks, kernel_of, method_for
from dwindle.factorization.layers import FactorizedLayer, make_layer, reads_seen
from dwindle.factorization.observation import Moments, input_moments, observed_calls
from dwindle.factorization.planning import (
    check_target,
    chosen_ranks,
    layer_weight,
    selected_settings,
    unfit_layers,
)
from dwindle.factorization.ranks import LayerProblem
from dwindle.factorization.result import FactorizationResult, LayerFactorization
from dwindle.factorization.svd import output_energy, widened
from dwindle.graph.macs import count_macs, counting_kernels
from dwindle.quantization.simulation import is_quantized
from dwindle.realize.chain_proof import TOLERANCE, chain_difference
from dwindle.realize.module_places import ModulePlaces
from dwindle.realize.optimizer import carry_over
from dwindle.realize.packing import floating_outputs
from dwindle.simulate import refuse_shards
from dwindle.training.inputs import Inputs
from dwindle.training.model_pass import undisturbed
from dwindle.training.progress import tracked

__all__ = ["LayerChain", "factorize", "layer_chain", "layer_problems", "replay_factorized"]


def factorize(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    *,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    data: Any = None,
    target: Mapping[str, float] | None = None,
    rank: int | tuple[int, int] | str | None = None,
    rank_ratio: float | None = None,
    energy: float | None = None,
    method: str = "auto",
    round_to: int = 1,
    minimum: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> FactorizationResult:
    """Replace linear layers and convolutions by chains of smaller ones of low rank, in place.

    A layer that would not get cheaper stays whole, and ``result.left`` says why; so does one whose weight is shared
    with another module, is read elsewhere, or is never used by a call.

    Args:
        model: Any float module; left as it was when anything fails.
        config_list: Entries of the kind ``factorization`` (``method``, ``rank``, ``rank_ratio``, ``energy``,
            ``round_to``, ``minimum``); None is every Linear, Conv1d, Conv2d, Conv3d and Hugging Face Conv1D.
        example_inputs: A tensor, or a tuple of positional inputs: where the layers compute, and how often.
        example_kwargs: Keyword inputs.
        data: Unlabelled batches. With them ``svd`` keeps what matters for each layer's outputs on the data rather than
            what is large in its weight, and biases take over the mean of what is lost.
        target: ``{"macs": 0.5}`` or ``{"params": 0.5}``: the share of the whole model that stays. Layers without a rank
            of their own share the budget so that they lose the least in sum, each relative to itself.
        rank: Rank of every layer that has none of its own (a pair: of outputs and inputs, for Tucker-2); ``"vbmf"``
            takes what evidence supports (variational Bayes).
        rank_ratio: Instead: share of the full rank.
        energy: Instead: share of the energy that is kept.
        method: ``"svd"``, ``"tucker"``, ``"cp"`` or ``"spatial"``; ``"auto"`` is SVD for matrices and Tucker-2 for
            larger kernels. Tucker-2 and CP need tensorly.
        round_to: Ranks become a multiple of this.
        minimum: Smallest rank.
        optimizer: A live optimizer: it goes on with the new weights, without moments for them.

    Raises:
        ConfigError: An argument is not valid; the model was not touched.
        CaptureError: The model fails on the inputs.
        RealizeError: A chain was not proven equal to its product, or the model fails with it; it is as it was.
    """
    refuse_shards(model, "dw.factorize")
    unit, share = check_target(target)
    common = _common(method, rank, rank_ratio, energy, round_to, minimum)
    if share is None and config_list is None and rank is None and rank_ratio is None and energy is None:
        raise ConfigError("give a target, rank, rank_ratio, energy, or a config_list that says the ranks")
    if share is not None and (rank is not None or rank_ratio is not None or energy is not None):
        raise ConfigError(
            "a target and a rank for all layers exclude each other; give ranks of single layers in a config_list"
        )
    if is_quantized(model):
        raise ConfigError("this model is quantized; factorize it first and quantize it afterwards")
    inputs = _inputs(example_inputs, example_kwargs)
    result = FactorizationResult(model)
    started = time.perf_counter()
    settings = selected_settings(model, config_list, common)
    result.left = unfit_layers(model, list(settings))
    problems, moments = layer_problems(model, settings, inputs, data, result.left)
    args, kwargs = inputs
    result.macs_before = count_macs(model, args, kwargs)
    result.parameters_before = _count(model)
    result.seconds["observe"] = time.perf_counter() - started
    started = time.perf_counter()
    budget = None if share is None else _budget(result, problems, unit, share)
    ranks, whole = chosen_ranks(problems, settings, unit=unit, budget=budget)
    result.left |= whole
    result.seconds["choose"] = time.perf_counter() - started
    started = time.perf_counter()
    chains = {
        name: layer_chain(model, name, problems[name], ranks[name], moments.get(name))
        for name in tracked(list(ranks), "factorizing")
    }
    _prove(model, chains, problems, result)
    _swap(model, chains, inputs, result, optimizer)
    result.macs_after, result.parameters_after = count_macs(model, args, kwargs), _count(model)
    result.seconds["factorize"] = time.perf_counter() - started
    entry = {
        name: {"method": layer.method, "ranks": list(layer.ranks)} for name, layer in result.layers.items()
    }
    if entry:
        history.record(model, {"kind": "factorize", "layers": entry})
    else:
        result.notes.append(
            "nothing was factorized: every layer stays whole (see result.left for the reasons)"
        )
    return result


def replay_factorized(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put chains where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The model before that step, changed in place.
        entry: The step of its history.

    Raises:
        FileFormatError: The entry does not fit the model.
    """
    places = ModulePlaces(model)
    for name, description in entry["layers"].items():
        old = model.get_submodule(name)
        weight = old._parameters.get("weight")
        if weight is None:
            raise FileFormatError(f"{name} holds no weight")
        form = form_of(old, weight)
        bias = old._parameters.get("bias")
        chain = make_layer(description["method"], form, description["ranks"], None, bias, weight)
        for parameter in chain.parameters():
            if parameter is not bias:
                nn.init.zeros_(parameter)
        places.put(name, chain.train(old.training))
    return model


def _common(
    method: str,
    rank: Any,
    rank_ratio: float | None,
    energy: float | None,
    round_to: int,
    minimum: int,
) -> FactorizationSetting:
    values = {
        "method": method,
        "rank": rank,
        "rank_ratio": rank_ratio,
        "energy": energy,
        "round_to": round_to,
        "minimum": minimum,
    }
    setting: FactorizationSetting = validate("factorization", values, "factorize")
    return setting


def _inputs(example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> Inputs:
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    return args, dict(example_kwargs or {})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layer_problems(
    model: nn.Module,
    settings: Mapping[str, FactorizationSetting],
    inputs: Inputs,
    data: Any,
    left: dict[str, str],
) -> tuple[dict[str, LayerProblem], dict[str, Moments]]:
    """Return what there is to decide, and what the layers read on the data; adds to ``left``."""
    weights = {name: layer_weight(model.get_submodule(name)) for name in settings if name not in left}
    forms = {name: form_of(model.get_submodule(name), weight) for name, weight in weights.items()}
    methods = {}
    for name, form in forms.items():
        try:
            methods[name] = method_for(form, settings[name].method)
        except ConfigError as error:
            left[name] = str(error)
    forms = {name: forms[name] for name in methods}
    calls = observed_calls(model, forms, inputs)
    for name in forms:
        if name not in calls:
            left[name] = "no call of it was seen: its weight is read by the module around it, or not at all"
    forms = {name: form for name, form in forms.items() if name in calls}
    moments = {}
    if data is not None:
        aware = {name: form for name, form in forms.items() if methods[name] == "svd"}
        moments = input_moments(model, aware, data)
    problems = {}
    for name, form in forms.items():
        kernel = widened(kernel_of(form, weights[name]))
        own = moments.get(name)
        centred = model.get_submodule(name)._parameters.get("bias") is not None
        covariance = None if own is None else own.second(centred=centred).to(kernel)
        problems[name] = LayerProblem(form, kernel, methods[name], calls[name], covariance)
    return problems, moments


def _budget(
    result: FactorizationResult, problems: Mapping[str, LayerProblem], unit: str, share: float
) -> float:
    """Return what the layers may cost together.

    Raises:
        ConfigError: What cannot be factorized costs more than the target alone.
    """
    total = result.macs_before if unit == "macs" else result.parameters_before
    fixed = total - sum(problem.whole_cost(unit) for problem in problems.values())
    if share * total < fixed:
        raise ConfigError(
            f"target: {unit} = {share:g} cannot be reached; what stays as it is already has {fixed / total:.3f}"
        )
    return share * total - fixed


@dataclass
class LayerChain:
    """A chain that is not in its place yet.

    Attributes:
        layer: The chain.
        report: What it is.
        bias: The value that its bias gets; None leaves it.
    """

    layer: FactorizedLayer
    report: LayerFactorization
    bias: Tensor | None


def layer_chain(
    model: nn.Module, name: str, problem: LayerProblem, ranks: tuple[int, ...], moments: Moments | None
) -> LayerChain:
    """Compute one chain."""
    old = model.get_submodule(name)
    weight, bias = layer_weight(old), old._parameters.get("bias")
    kernel, method = problem.kernel, problem.method
    numbers = factors(method, kernel, ranks, problem.covariance)
    layer = make_layer(method, problem.form, ranks, numbers, bias, weight)
    layer.train(old.training)
    with torch.no_grad():
        lost = kernel - kernel_of(problem.form, layer.weight).to(kernel)
        error = float(torch.linalg.vector_norm(lost) / torch.linalg.vector_norm(kernel).clamp(min=1e-300))
        output_error = new_bias = None
        if moments is not None and problem.covariance is not None:
            flat, whole = lost.flatten(1), output_energy(kernel.flatten(1), problem.covariance)
            output_error = (output_energy(flat, problem.covariance) / max(whole, 1e-300)) ** 0.5
            if bias is not None:
                new_bias = (bias.to(kernel) + flat @ moments.mean.to(kernel)).to(bias)
    report = LayerFactorization(
        method=method,
        ranks=tuple(ranks),
        full_ranks=full_ranks(method, problem.form),
        macs_before=int(problem.whole_cost("macs")),
        macs_after=int(problem.cost(ranks, "macs")),
        parameters_before=problem.form.elements,
        parameters_after=int(problem.cost(ranks, "params")),
        weight_error=error,
        output_error=output_error,
    )
    return LayerChain(layer, report, new_bias)


def _prove(
    model: nn.Module,
    chains: Mapping[str, LayerChain],
    problems: Mapping[str, LayerProblem],
    result: FactorizationResult,
) -> None:
    """Hold every chain against the one layer with its product as weight.

    Raises:
        RealizeError: One differs.
    """
    for name, chain in chains.items():
        found = chain_difference(model.get_submodule(name), chain.layer, problems[name].calls[0])
        if not found <= TOLERANCE:
            raise RealizeError(
                f"{name}: the chain differs from the layer of its product by {found:.2g}; the model is unchanged"
            )
        result.proof = max(result.proof, found)


def _swap(
    model: nn.Module,
    chains: dict[str, LayerChain],
    inputs: Inputs,
    result: FactorizationResult,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Put the chains in their places, see that the model runs, and take back those whose product it reads.

    Raises:
        RealizeError: The model fails with them; everything is as it was.
    """
    if not chains:
        return
    places = ModulePlaces(model)
    old = {name: model.get_submodule(name) for name in chains}
    before = _outputs(model, inputs)
    undo: list[Callable[[], None]] = []
    try:
        for name, chain in chains.items():
            _carry_hooks(old[name], chain.layer)
            places.put(name, chain.layer)
        with reads_seen() as read:
            _outputs(model, inputs)
        kept = {name: chain for name, chain in chains.items() if id(chain.layer) not in read}
        for name in set(chains) - set(kept):
            places.put(name, old[name])
            result.left[name] = "the forward reads its weight, which would be multiplied out at every call"
        for chain in kept.values():
            undo += _move_bias(chain)
        if optimizer is not None:
            layers = [chain.layer for chain in kept.values()]
            fresh = [own for layer in layers for own in layer.parameters() if own is not layer.bias]
            dropped = [layer_weight(old[name]) for name in kept]
            undo.append(carry_over(optimizer, {}, added=fresh, dropped=dropped))
        after = _outputs(model, inputs)
    except Exception as error:
        for step in reversed(undo):
            step()
        for name, module in old.items():
            places.put(name, module)
        raise RealizeError(f"the model fails with factorized layers ({error}); it is unchanged") from error
    result.output_change = _change(before, after)
    result.layers = {name: chain.report for name, chain in kept.items()}


def _carry_hooks(old: nn.Module, fresh: nn.Module) -> None:
    """Give a new layer the hooks of the old one's calls."""
    for kind in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(fresh, kind).update(getattr(old, kind))


def _move_bias(chain: LayerChain) -> list[Callable[[], None]]:
    """Give a chain's bias its new value, in the parameter that it is; return what undoes it."""
    bias = chain.layer.bias
    if chain.bias is None or bias is None:
        return []
    saved = bias.detach().clone()

    def put(value: Tensor) -> None:
        with torch.no_grad():
            bias.copy_(value)

    put(chain.bias)
    return [lambda: put(saved)]


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the floating outputs in evaluation mode, through the layers' own calls."""
    args, kwargs = inputs
    with undisturbed(model), torch.no_grad(), counting_kernels():
        return [own.double() for own in floating_outputs(model(*args, **kwargs))]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the norm of what outputs changed by, over their norm."""
    changed = sum(float((new - old).square().sum()) for old, new in zip(before, after, strict=True))
    whole = sum(float(old.square().sum()) for old in before)
    return float((changed / max(whole, 1e-300)) ** 0.5)
