"""What follows from drops: ratios that pruners take, bits that quantizers take, ranks that ``dw.factorize`` takes."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.measure import count_macs, count_parameters
from dwindle.quantization.simulation import simulation_of
from dwindle.search import SensitivityResult
from search.graded import batches, graded

BITS = (8, 6, 4, 2)


@cache
def analysed() -> SensitivityResult:
    return dw.sensitivity(
        graded(),
        batches(),
        ratios=(0.2, 0.4, 0.6, 0.8),
        bits=BITS,
        rank_ratios=(0.5, 0.34, 0.17),
        observer="minmax",
    )


def drops(kind: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for point in analysed().points:
        if point.kind == kind:
            found.setdefault(point.target, []).append((point.level, point.drop))
    return found


def macs(model: nn.Module) -> int:
    return count_macs(model, (batches()[0],))


def pruned(entries: list[dict]) -> nn.Module:
    model = graded()
    pruner = dw.pruning.L1NormPruner(model, entries, example_inputs=batches()[0])
    pruner.compress()
    result = dw.realize(model, example_inputs=batches()[0])
    assert result.verification.proven
    return result.model


def test_ratios_of_a_drop_are_the_largest_within_it() -> None:
    tolerated = 0.4 * max(drop for curve in drops("pruning").values() for _, drop in curve)
    small = pruned(analysed().ratios(drop=tolerated))
    kept = {"stem.weight[0]": (small.stem.out_channels, 6), "inner.weight[0]": (small.inner.out_channels, 8)}
    for name, curve in drops("pruning").items():
        ratios, values = zip((0.0, 0.0), *curve, strict=True)
        rising = np.maximum.accumulate(values)
        stays, size = kept[name]
        assert np.interp((size - stays) / size, ratios, rising) <= tolerated * (1 + 1e-9)
        assert (
            stays == size
            or np.interp((size - stays + 1) / size, ratios, rising) > tolerated
            or ((size - stays + 1) / size > ratios[-1])
        )
    assert {stays for stays, _ in kept.values()} != {6, 8}


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_ratios_meet_a_budget(cost: str) -> None:
    whole, small = graded(), pruned(analysed().ratios(budget={cost: 0.6}))
    if cost == "macs":
        assert macs(small) <= 0.6 * macs(whole)
    else:
        assert count_parameters(small).total <= 0.6 * count_parameters(whole).total
    assert small.stem.out_channels > 1


def test_bits_of_a_budget_are_the_best_of_all() -> None:
    """Against every assignment: each layer reads something else here, so that no two share their bits."""
    curves = {name: dict(curve) for name, curve in drops("quantization").items()}
    sizes = {
        f"{name}.weight": graded().get_submodule(name).weight.numel()
        for name in ("stem", "inner", "back", "head")
    }

    def harm(name: str, bits: int) -> float:
        return max(own for level, own in curves[name].items() if level >= bits)

    chosen = analysed().mixed_precision(budget={"mean_bits": 4})
    found = {layer.name: layer.weight_bits for layer in chosen.layers}
    assert all(layer.activation_bits == layer.weight_bits for layer in chosen.layers)
    total = sum(sizes.values())
    assert sum(sizes[name] * bits for name, bits in found.items()) <= 4 * total
    best = min(
        sum(harm(name, bits) for name, bits in zip(sizes, own, strict=True))
        for own in product(BITS, repeat=4)
        if sum(size * bits for size, bits in zip(sizes.values(), own, strict=True)) <= 4 * total
    )
    assert sum(harm(name, bits) for name, bits in found.items()) == pytest.approx(best, rel=1e-9)


def test_bits_run_in_quantize() -> None:
    tolerated = 1e-3
    entries = analysed().bits(drop=tolerated)
    quantized = dw.quantize(graded(), batches(), config_list=entries, backend="layers", observer="minmax")
    simulation = simulation_of(quantized)
    assert len(simulation.slots) == 4
    for slot in simulation.slots.values():
        fitting = [int(bits) for bits, drop in drops("quantization")[slot.place.name] if drop <= tolerated]
        assert slot.place.form.bits == min(fitting)
        assert simulation.forms[slot.place.input_quantizer].bits == min(fitting)


def test_bits_train() -> None:
    model = graded().float().train()
    entries = analysed().bits(budget={"bit_operations": 0.6})
    quantizer = dw.quantization.TrainingQuantizer(
        model, entries, calibration_data=[x.float() for x in batches()]
    )
    with dw.compress(model, [quantizer]) as run:
        data = batches()[0].float()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        (model(data).square().mean() + run.loss()).backward()
        optimizer.step()
        run.step()


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_ranks_run_in_factorize(cost: str) -> None:
    whole, small = graded(), graded()
    result = dw.factorize(small, analysed().ranks(budget={cost: 0.8}), example_inputs=batches()[0])
    assert result.layers
    if cost == "macs":
        assert macs(small) <= 0.8 * macs(whole)
    else:
        assert count_parameters(small).total <= 0.8 * count_parameters(whole).total


def test_ranks_of_a_drop_are_the_cheapest_within_it() -> None:
    tolerated = sorted(drop for curve in drops("factorization").values() for _, drop in curve)[5]
    entries = analysed().ranks(drop=tolerated)
    small = graded()
    result = dw.factorize(small, entries, example_inputs=batches()[0])
    assert set(result.layers) == {name for entry in entries for name in entry["op_names"]}
    points = [point for point in analysed().points if point.kind == "factorization"]
    for name, layer in result.layers.items():
        (point,) = [own for own in points if own.target == f"{name}.weight" and own.detail == layer.ranks]
        milder = [own.drop for own in points if own.target == point.target and own.level >= point.level]
        assert max(milder) <= tolerated
        assert layer.macs_after < layer.macs_before


def test_what_an_early_stop_left_out_is_not_chosen() -> None:
    limit = 1e-4
    result = dw.sensitivity(
        graded(), batches(), kinds=["quantization"], bits=BITS, observer="minmax", stop_drop=limit
    )
    measured = {(point.target, point.detail[0]) for point in result.points}
    assert len(measured) < 16
    chosen = result.mixed_precision(budget={"mean_bits": 7})
    assert all((layer.name, layer.weight_bits) in measured for layer in chosen.layers)
    with pytest.raises(ConfigError, match="cannot be reached"):
        result.bits(budget={"mean_bits": 2})


def test_layers_that_were_not_selected_keep_8_bits() -> None:
    result = dw.sensitivity(
        graded(),
        batches(),
        kinds=["quantization"],
        bits=(4, 2),
        config_list=[{"op_types": ["Conv2d"]}],
        observer="minmax",
    )
    bits = {layer.name: layer.weight_bits for layer in result.mixed_precision(drop=1.0).layers}
    assert bits.pop("head.weight") == 8
    assert set(bits.values()) == {2}


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("ratios", {}, "exactly one of drop and budget"),
        ("ratios", {"drop": 0.1, "budget": {"macs": 0.5}}, "exactly one"),
        ("ratios", {"drop": -1}, "drop"),
        ("ratios", {"budget": {"mac": 0.5}}, "did you mean 'macs'"),
        ("ratios", {"budget": {"macs": 1.5}}, "up to 1"),
        ("ratios", {"budget": {"macs": 0.001}}, "measure larger ratios"),
        ("ranks", {"budget": {"macs": 0.001}}, "measure smaller ranks"),
        ("bits", {"budget": {"mean_bits": 1}}, "cannot be reached"),
        ("bits", {"drop": 0.1, "activations": "sensitive"}, "not measured"),
    ],
)
def test_goals_that_do_not_fit_are_named(which: str, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(analysed(), which)(**arguments)


def test_no_drop_at_all_gives_nothing() -> None:
    assert analysed().ratios(drop=0.0) == []
    assert analysed().ranks(drop=0.0) == []
    assert {layer.weight_bits for layer in analysed().mixed_precision(drop=0.0).layers} == {8}


def test_the_choice_leaves_the_model() -> None:
    before = copy.deepcopy(analysed()._subjects["pruning"].problem.model.state_dict())
    analysed().ratios(budget={"macs": 0.6})
    after = analysed()._subjects["pruning"].problem.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
