"""dw.sensitivity against changes made by hand; early stop; killed, interrupted and resumed; bad arguments."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dwindle as dw
from dwindle.config.errors import ConfigError
from dwindle.search import SensitivityResult
from search.graded import batches, cut, graded, noise, of_rank, rounded

MATRICES = [{"op_names": ["back", "head"]}]


def quick(model: nn.Module, data: object, metric=None, **options) -> SensitivityResult:
    """Few levels, whole ranges of inputs."""
    chosen = {
        "ratios": (0.25, 0.5, 0.75),
        "bits": (8, 4, 2),
        "rank_ratios": (0.5, 0.25),
        "observer": "minmax",
    }
    return dw.sensitivity(model, data, metric, **{**chosen, **options})


def facts(result: SensitivityResult) -> list[tuple]:
    return [tuple(v for name, v in vars(point).items() if name != "seconds") for point in result.points]


def state(model: nn.Module) -> tuple:
    return (
        {name: (id(own), own.clone()) for name, own in [*model.named_parameters(), *model.named_buffers()]},
        [module.training for module in model.modules()],
        [own.requires_grad for own in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_as_before(before: tuple, after: tuple) -> None:
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert before[0].keys() == after[0].keys()
    for name, (identity, value) in before[0].items():
        assert after[0][name][0] == identity
        assert torch.equal(after[0][name][1], value), name


def test_cuts_are_those_by_hand() -> None:
    model, data = graded(), batches()
    result = quick(model, data, kinds=["pruning"])
    assert {target.name for target in result.targets("pruning")} == {"stem.weight[0]", "inner.weight[0]"}
    sizes = {"stem": 6, "inner": 8}
    assert len(result.points) == 6
    for point in result.points:
        axis = point.target.partition(".")[0]
        gone = sizes[axis] - point.detail[0]
        assert point.level == pytest.approx(gone / sizes[axis])
        wanted = noise(model, cut(model, axis, gone), data)
        assert wanted > 1e-6
        assert point.drop == pytest.approx(wanted, rel=1e-9)
        assert point.score == pytest.approx(-10 * math.log10(wanted), rel=1e-9)


@pytest.mark.parametrize(("input_bits", "read"), [("same", None), (None, 0), (8, 8)])
def test_roundings_are_those_by_hand(input_bits: object, read: int | None) -> None:
    model, data = graded(), batches()
    result = quick(model, data, kinds=["quantization"], input_bits=input_bits)
    assert len(result.points) == 4 * 3
    for point in result.points:
        bits, layer = int(point.level), point.target.removesuffix(".weight")
        own = bits if read is None else read
        assert point.detail == (bits, own)
        wanted = noise(model, rounded(model, layer, bits, own, data), data)
        assert wanted > 1e-10
        assert point.drop == pytest.approx(wanted, rel=1e-4)  # scales are float32


def test_ranks_are_those_by_hand() -> None:
    model, data = graded(), batches()
    result = quick(model, data, kinds=["factorization"], config_list=MATRICES, ranks=[1])
    found = {(point.target, point.detail[0]): point.drop for point in result.points}
    # a quarter of a full rank of 5 or 6 is the rank 1 or 2, and a half is 3
    assert set(found) == {
        ("head.weight", 3),
        ("head.weight", 1),
        *(("back.weight", rank) for rank in (3, 2, 1)),
    }
    for (name, rank), drop in found.items():
        wanted = noise(model, of_rank(model, name.removesuffix(".weight"), rank), data)
        assert drop == pytest.approx(wanted, rel=1e-8)


def test_chains_that_know_the_data_are_those_of_factorize() -> None:
    model, data = graded(), batches()
    result = quick(
        model, data, kinds=["factorization"], config_list=[{"op_names": ["back"]}], ranks=[2], rank_ratios=[],
        data_aware=True,
    )  # fmt: skip
    (point,) = result.points
    small = graded()
    dw.factorize(small, [{"op_names": ["back"], "rank": 2}], example_inputs=data[0], data=data)
    assert point.drop == pytest.approx(noise(model, small, data), rel=1e-7)


def test_a_metric_decides_where_there_is_one() -> None:
    model, data = graded(), batches()

    def loss(own: nn.Module) -> float:
        assert not own.training
        assert not torch.is_grad_enabled()
        return float(own(data[0]).square().mean()) + 2

    result = quick(model, data, loss, kinds=["pruning"], greater_is_better=False)
    with torch.no_grad():
        assert result.baseline == loss(model)
    for point in result.points:
        axis = point.target.partition(".")[0]
        size = {"stem": 6, "inner": 8}[axis]
        with torch.no_grad():
            wanted = loss(cut(model, axis, size - point.detail[0]))
        assert point.score == pytest.approx(wanted, rel=1e-9)
        assert point.drop == pytest.approx(wanted - result.baseline, abs=1e-9)


def test_early_stop_leaves_out_what_lies_behind() -> None:
    model, data = graded(), batches()
    every = quick(model, data)
    bound = sorted(point.drop for point in every.points)[len(every.points) // 2]
    fewer = quick(model, data, stop_drop=bound)
    assert 0 < len(fewer.points) < len(every.points)
    curves: dict[tuple, list] = {}
    for point in every.points:
        curves.setdefault((point.kind, point.target), []).append(point)
    wanted = []
    for points in curves.values():
        passed = next((place for place, own in enumerate(points) if own.drop > bound), len(points))
        wanted += points[: passed + 1]
    assert facts(fewer) == facts(
        SensitivityResult(list(every._subjects.values()), wanted, "sqnr", math.inf, [])
    )


class Interrupt:
    """A forward hook that interrupts at one call: in the middle of the model, also while it is rounded."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_an_interrupt_leaves_the_model_and_what_was_done_is_kept(share: float, tmp_path: Path) -> None:
    model, data = graded(), batches()
    model.norm.train()
    count = Interrupt(0)
    handle = model.back.register_forward_hook(lambda *call: count(*call))
    before = state(model)
    undisturbed = quick(model, data)
    assert_as_before(before, state(model))
    handle.remove()
    at = max(1, int(-count.left * share))

    interrupt = Interrupt(at)
    # not a bound method: a copy of the model shares the count
    handle = model.back.register_forward_hook(lambda *call: interrupt(*call))
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        quick(model, data, storage=tmp_path)
    assert_as_before(before, state(model))
    assert torch.overrides._len_torch_function_stack() == 0
    handle.remove()
    path = tmp_path / "sensitivity.jsonl"
    kept = len(path.read_text().splitlines()) if path.exists() else 0
    assert kept < len(undisturbed.points)
    if path.exists():
        path.write_bytes(path.read_bytes() + b'{"key": "torn')
    resumed = quick(model, data, storage=tmp_path)
    assert facts(resumed) == facts(undisturbed)
    assert resumed.to_json()["kinds"][0]["targets"][0]["name"]


def test_a_resumed_analysis_measures_nothing_twice(tmp_path: Path) -> None:
    model, data = graded(), batches()
    calls = []

    def metric(own: nn.Module) -> float:
        calls.append(own)
        return float(own(data[0])[0, 0] + torch.rand(()))  # draws the same for every point

    first = quick(model, data, metric, kinds=["pruning"], ratios=(0.5,), storage=tmp_path)
    assert len(calls) == 3
    again = quick(model, data, metric, kinds=["pruning"], ratios=(0.5,), storage=tmp_path)
    assert len(calls) == 3
    assert again.to_json() == first.to_json()
    more = quick(model, data, metric, kinds=["pruning"], storage=tmp_path)
    assert len(calls) == 3 + 4
    assert facts(more) == facts(quick(model, data, metric, kinds=["pruning"]))
    with pytest.raises(ConfigError, match="score differ"):
        quick(model, data, storage=tmp_path)
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ConfigError, match="measurements of another search: model differ"):
        quick(model, data, metric, storage=tmp_path)


def test_what_fails_is_a_point_and_ends_its_curve() -> None:
    model, data = graded(), batches()

    def fragile(own: nn.Module) -> float:
        value = float(own(data[0]).sum())
        return math.nan if own.inner.out_channels < 5 else value

    result = quick(model, data, fragile, kinds=["pruning"], ratios=(0.25, 0.5, 0.75), stop_drop=1e9)
    levels = result.curve("inner.weight[0]")
    assert [level for level, _ in levels] == [0.25, 0.5]
    assert levels[1][1] is None
    assert result.targets("pruning")[0].name == "inner.weight[0]"
    point = next(point for point in result.points if point.error)
    assert point.drop == math.inf
    assert "nan" in point.error
    json.dumps(result.to_json(), allow_nan=False)
    assert "failed" in result.table()


class Halves(nn.Module):
    """Two halves of one layer that must stay equally long, whatever their indices."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Linear(5, 16), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.both(x).chunk(2, -1)
        return self.left(torch.relu(one)) + self.right(torch.relu(two))


def test_axes_of_equal_counts_are_cut_together() -> None:
    torch.manual_seed(0)
    result = quick(Halves(), torch.randn(7, 5), kinds=["pruning"], ratios=(0.5,))
    (point,) = result.points
    assert point.detail == (4,)
    assert point.drop > 0
    (entry,) = result.ratios(drop=math.inf)
    assert entry["sparse_ratio"] == pytest.approx(0.5)


def test_tables_and_files(tmp_path: Path) -> None:
    model, data = graded(), batches()
    result = quick(model, data, kinds=["quantization", "factorization"], config_list=MATRICES)
    assert "stem" not in result.table()
    for kind in result.kinds:
        order = [target.name for target in result.targets(kind)]
        harms = {
            name: [p.drop for p in result.points if (p.kind, p.target) == (kind, name)] for name in order
        }
        assert order == sorted(order, key=lambda name: -sum(harms[name]) / len(harms[name]))
    with pytest.raises(ConfigError, match="give kind"):
        result.curve("head.weight")
    assert [level for level, _ in result.curve("head.weight", "quantization")] == [8, 4, 2]
    with pytest.raises(ConfigError, match=r"did you mean 'head\.weight'"):
        result.curve("hed.weight")
    with pytest.raises(ConfigError, match="'pruning' was not measured"):
        result.ratios(drop=0.1)
    result.to_csv(tmp_path / "points.csv")
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert [float(row["drop"]) for row in rows] == [point.drop for point in result.points]
    assert {row["members"] for row in rows} == {"back.weight", "head.weight"}
    record = result.to_json()
    assert [kind["kind"] for kind in record["kinds"]] == ["quantization", "factorization"]
    assert record["baseline"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["prunning"]}, "did you mean 'pruning'"),
        ({"kinds": []}, "kinds"),
        ({"ratios": [1.0]}, "ratios"),
        ({"bits": [1]}, "bits"),
        ({"rank_ratios": [0.0]}, "rank_ratios"),
        ({"ranks": [0]}, "ranks"),
        ({"stop_drop": -0.1}, "stop_drop"),
        ({"importance": "l3"}, "l3"),
        ({"input_bits": "sam"}, "did you mean 'same'"),
        ({"observer": "minmx"}, "did you mean 'minmax'"),
        ({"method": "svt"}, "did you mean 'svd'"),
        ({"config_list": [{"op_names": ["haed"]}]}, "did you mean 'head'"),
        ({"config_list": [{"op_names": ["head"], "rank": 2}]}, "only selects"),
        ({"config_list": [{"op_names": ["head"]}], "kinds": ["pruning"]}, "selects nothing"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dw.sensitivity(graded(), batches(), **options)


def test_a_model_without_a_score_and_no_data_are_refused() -> None:
    with pytest.raises(ConfigError, match="unchanged model's score is nan"):
        quick(graded(), batches(), lambda own: math.nan)
    with pytest.raises(ConfigError, match="no batch"):
        quick(graded(), [])


def test_labelled_batches_serve_importances_and_ranges() -> None:
    model = graded()
    labelled = [[x, torch.arange(6) % 5] for x in batches()]
    result = quick(
        model, iter(labelled), kinds=["pruning", "quantization"], importance="taylor", max_batches=1
    )
    plain = quick(model, batches()[0], kinds=["quantization"])
    assert [p.drop for p in result.points if p.kind == "quantization"] == [p.drop for p in plain.points]
    small = graded()
    dw.prune(small, (batches()[0],), ratio=0.5, ignore=["stem"], importance="taylor", data=labelled[:1])
    (point,) = [p for p in result.points if p.target == "inner.weight[0]" and p.level == 0.5]
    assert point.drop == pytest.approx(noise(model, small, batches()[:1]), rel=1e-9)
