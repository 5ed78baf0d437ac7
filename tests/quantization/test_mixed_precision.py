"""Bits chosen for a model: policies, what the config_list makes of it, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.quantization import NumberFormat, choose_bits, manual_bits, parity
from dwindle.quantization.aware_training import TrainingQuantizer
from dwindle.quantization.mixed_precision.perturbation import rounding_error
from dwindle.quantization.simulation import simulation_of


class Net(nn.Module):
    """Two layers read one value, and two read one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.wide = nn.Linear(4, 32)
        self.back = nn.Linear(32, 4)
        self.again = nn.Linear(32, 4)
        self.again.weight = self.back.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x)).mean((2, 3))
        y = torch.relu(self.back(torch.relu(self.wide(x))))
        return self.head(y + self.again(torch.tanh(self.wide(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def labelled(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 1, 5, 5), torch.randint(0, 3, (8,))) for _ in range(count)]


def quick(model: nn.Module, data: Any = None, **options: Any) -> Any:
    given = {"probes": 12, "activations": "liberal", **options}
    return choose_bits(model, labelled() if data is None else data, **given)


def realized_bits(
    model: nn.Module, config_list: Any, backend: str = "layers"
) -> dict[str, set[tuple[int, int]]]:
    """Bits of weight and input of every call of the quantized model, by module."""
    quantized = dw.quantize(model, labelled(), config_list=config_list, backend=backend)
    simulation = simulation_of(quantized)
    found: dict[str, set[tuple[int, int]]] = {}
    for key, slot in simulation.slots.items():
        read = simulation.forms[slot.place.input_quantizer].bits
        found.setdefault(key.module, set()).add((slot.place.form.bits, read))
    return found


def test_the_ratio_is_reached_and_quantize_takes_the_choice() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = quick(model, ratio=1.6)
    assert found.ratio >= 1.6
    assert found.ratio == pytest.approx(found.compression["bit_operations"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = {name.removesuffix(".weight"): {bits} for name, bits in found.bits.items()}
    realized = realized_bits(model, found.config_list)
    assert realized.pop("again") == realized["back"]  # one weight
    assert {name: {w for w, _ in own} for name, own in realized.items()} == {
        name: {w for w, _ in own} for name, own in expected.items()
    }


@pytest.mark.parametrize("activations", ["liberal", "strict"])
def test_policies_of_activations(activations: str) -> None:
    found = quick(net(), ratio=1.5, activations=activations)
    realized = realized_bits(net(), found.config_list)
    assert {read for _, read in realized["left"]} == {read for _, read in realized["right"]}
    for own in realized.values():
        assert len({weight for weight, _ in own}) == 1
    weights = {name: next(iter(own))[0] for name, own in realized.items()}
    reads = {name: {read for _, read in own} for name, own in realized.items()}
    if activations == "strict":
        assert weights["left"] == weights["right"]
        assert all(reads[name] == {weights[name]} for name in ("stem", "left", "right", "head"))
    else:
        assert reads["left"] == {min(weights["left"], weights["right"])}
        assert reads["head"] == {weights["head"]}


def test_activations_by_their_own_sensitivity_and_by_a_number() -> None:
    options = {"ratio": 2, "bits": range(2, 9), "activations": "sensitive"}
    both = [quick(net(), solver=own, **options) for own in ("pareto", "integer")]
    assert both[0].ratio >= 2
    assert both[1].ratio >= 2
    assert both[0].harm == pytest.approx(both[1].harm, rel=1e-9)
    eight = quick(net(), ratio=1.9, cost="size", activations=8)
    assert eight.ratio >= 1.9
    assert {read for own in realized_bits(net(), eight.config_list).values() for _, read in own} == {8}


def test_less_harm_with_more_choice_and_lower_ratios() -> None:
    few = quick(net(), ratio=2)
    more = quick(net(), ratio=2, bits=range(2, 9))
    milder = quick(net(), ratio=1.2)
    assert more.harm <= few.harm
    assert milder.harm <= few.harm
    harms = [harm for _, harm in few.frontier]
    assert harms == sorted(harms, reverse=True)


def test_training_takes_the_same_bits() -> None:
    model = net()
    found = quick(model, ratio=1.6)
    options = {"calibration_data": labelled(), "backend": "layers", "avoid_saturation": False}
    quantizer = TrainingQuantizer(model, found.config_list, **options)
    places = quantizer.places.final
    own = {key.module: place.form.bits for key, place in places.weights.items()}
    assert own == {
        name: next(iter(bits))[0] for name, bits in realized_bits(model, found.config_list).items()
    }


def test_bits_that_were_given_stay() -> None:
    given = [{"op_names": ["stem"], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}]
    given += [{"op_names": ["head"], "quant_dtype": None}]
    found = quick(net(), ratio=1.5, config_list=given)
    assert "head.weight" not in found.bits
    stem = found.layers[0]
    assert (stem.name, stem.weight_bits, stem.free) == ("stem.weight", 8, False)
    assert found.config_list[:2] == given
    realized = realized_bits(net(), found.config_list)
    assert "head" not in realized
    assert realized["stem"] == {(8, 8)}


def test_bits_by_hand() -> None:
    found = manual_bits(net(), labelled()[0][0], {"left": 4, "wide*": (2, 8)})
    assert found.bits["left.weight"] == (4, 4)
    assert found.bits["wide.weight"] == (2, 8)
    assert found.bits["stem.weight"] == (8, 8)
    left, wide = (
        next(own for own in found.layers if own.name == name) for name in ("left.weight", "wide.weight")
    )
    total = sum(own.macs for own in found.layers)
    assert left.macs == 8 * 5 * 5 * 4 * 36
    assert wide.macs == 2 * 8 * 4 * 32
    assert found.compression["bit_operations"] == pytest.approx(total * 8 / (total * 8 - left.macs * 4))
    size = sum(own.size for own in found.layers)
    stored = size * 8 - left.size * 4 - wide.size * 6
    assert found.compression["size"] == pytest.approx(size * 8 / stored)
    assert found.compression["size_float32"] == pytest.approx(size * 32 / stored)
    assert found.weight_bytes == pytest.approx(stored / 8)
    assert realized_bits(net(), found.config_list)["wide"] == {(2, 8)}
    with pytest.raises(ConfigError, match="did you mean 'left'"):
        manual_bits(net(), labelled()[0][0], {"lefft": 4})


def test_attention_has_bits_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    data = [torch.randn(2, 3, 8)]
    found = choose_bits(model, data, ratio=1.7, loss="own_outputs", probes=6)
    names = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert set(found.bits) == names
    assert found.ratio >= 1.7
    simulation = simulation_of(dw.quantize(model, data, config_list=found.config_list, backend="layers"))
    assert {slot.place.name: slot.place.form.bits for slot in simulation.slots.values()} == {
        name: weight for name, (weight, _) in found.bits.items()
    }


def test_the_file_of_a_choice_computes_what_was_simulated(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    found = quick(net(), ratio=1.6, bits=(3, 4, 8), activations="sensitive")
    assert len({bits for own in found.bits.values() for bits in own}) > 1
    quantized = dw.quantize(net(), labelled(), config_list=found.config_list, backend="layers")
    path = tmp_path / "mixed.onnx"
    dw.export(quantized, path, example_inputs=labelled()[0][0])
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    result = parity(quantized, lambda x: session.run(None, {name: x}), labelled())
    assert result.sqnr_db >= 30
    assert result.equal_predictions >= 0.995


def test_reports(tmp_path: Path) -> None:
    found = quick(net(), ratio=1.6)
    table = found.table()
    assert all(own.name in table for own in found.layers)
    assert "bit_operations" in table
    again = json.loads(json.dumps(found.to_json()))
    assert again["ratio"] == pytest.approx(found.ratio)
    assert len(again["layers"]) == len(found.layers)
    found.figure(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes()[:4] == b"\x89PNG"
    manual_bits(net(), labelled()[0][0]).figure(tmp_path / "by_hand.svg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 4.5}, "cannot be reached"),
        ({"ratio": 2, "activations": 8}, "cannot be reached"),
        ({"bits": (1, 4)}, "not a number from 2 to 8"),
        ({"bits": ()}, "nothing to choose"),
        ({"solver": "greedy"}, "solver 'greedy'"),
        ({"activations": "librel"}, "did you mean 'liberal'"),
        ({"activations": 1}, "number of bits"),
        ({"cost": "bytes"}, "cost 'bytes'"),
        ({"probes": 1}, "at least 2"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"observer": "minmx"}, "minmax"),
        ({"max_batches": 3}, "ended after 2 of 3"),
        (
            {"config_list": [{"op_types": ["Linear", "Conv2d"], "quant_dtype": None}]},
            "no operation",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quick(net(), **options)


def test_contradictions_are_refused() -> None:
    said = [
        {"op_names": [name], "target_names": ["weight"], "quant_dtype": dtype}
        for name, dtype in (("left", "int4"), ("right", "int8"))
    ]
    assert quick(net(), config_list=said, ratio=1.2).bits["left.weight"][0] == 4
    with pytest.raises(ConfigError, match=r"left.weight has 4 bits.*right.weight has 8 bits"):
        quick(net(), config_list=said, ratio=1.2, activations="strict")
    tied = [{"op_names": ["again"], "target_names": ["weight"], "quant_dtype": "int4"}]
    with pytest.raises(ConfigError, match="same bits"):
        quick(net(), config_list=tied)


def test_masked_weights_are_judged_as_they_are_read() -> None:
    model = net()
    pruner = dw.pruning.L1NormPruner(model, [{"op_names": ["wide"], "sparse_ratio": 0.75}])
    pruner.compress()
    found = quick(model, ratio=1.3)
    layer = next(own for own in found.layers if own.name.startswith("wide"))
    weight = model.wide.weight.detach()
    assert int((weight == 0).sum()) >= 0.75 * weight.numel()
    form = NumberFormat.parse("int4", "symmetric")
    assert layer.errors[4] == pytest.approx(rounding_error(weight, 0, form))
    assert found.ratio >= 1.3


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        quick(dw.quantize(net(), labelled()))


def test_data_that_hold_nan_are_refused() -> None:
    x, y = labelled()[0]
    with pytest.raises(ConfigError, match="batch 1 of data"):
        quick(net(), [(x, y), (x / 0, y)])
