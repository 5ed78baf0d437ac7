"""Whole residual blocks: found in the recording, taken out, and equal to a model whose branches are zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dwindle as dw
from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import analyse
from dwindle.graph.inspect import describe, to_json
from dwindle.realize import PassThrough, ShrinkResult, depth_proof
from dwindle.realize.depth_proof import StillRandomness


class Basic(nn.Module):
    """Two convolutions, a shortcut, and an activation after the sum."""

    def __init__(self, inner: int, outer: int, stride: int = 1, after: Callable[..., Any] = F.relu) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.second, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride) if inner != outer else None
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)), inplace=True)))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.after(y)


class SmallResNet(nn.Module):
    def __init__(self, after: Callable[..., Any] = F.relu) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(*[Basic(8, 8, after=after) for _ in range(3)])
        self.stage2 = nn.Sequential(Basic(8, 16, 2), *[Basic(16, 16, after=after) for _ in range(3)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        return self.head(self.stage2(self.stage1(x)).mean((2, 3)))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, with layer scale and dropout; gives back what else it worked out."""

    def __init__(self, place: int, width: int = 16) -> None:
        super().__init__()
        self.layer_idx = place
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.feed = nn.Sequential(
            nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, width), nn.Dropout(0.1)
        )

    def forward(
        self, x: torch.Tensor, cache: dict[int, Any] | None = None, strength: float = 1.0
    ) -> tuple[torch.Tensor, None]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[self.layer_idx] = k
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + strength * self.scale * self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x)), None


class Transformer(nn.Module):
    """Layers in a list; ``by_place`` lets the code count on their places: around the layers, or inside."""

    def __init__(self, depth: int = 5, by_place: str = "") -> None:
        super().__init__()
        self.num_layers, self.by_place = depth, by_place
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(Layer(place) for place in range(depth))

    def forward(self, x: torch.Tensor, cache: dict[int, Any] | None = None) -> torch.Tensor:
        x = self.embed(x)
        for place in range(self.num_layers):
            if self.by_place == "around":
                x = x * (1 + 0.1 * place)
            x = self.layers[place](x, cache, 1 + place if self.by_place == "inside" else 1.0)[0]
        return self.head(x)


def liven(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return model


def removed(result: ShrinkResult) -> list[str]:
    return [removal.path for removal in result.plan.blocks]


def masked_by_hand(dense: nn.Module, result: ShrinkResult) -> nn.Module:
    """The dense model with the ends of the branches at zero: eager, and no graph in sight."""
    masked = copy.deepcopy(dense)
    for removal in result.plan.blocks:
        for name in removal.zeroed:
            nn.init.zeros_(masked.get_parameter(name))
    return masked


def first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else first_tensor(next(iter(output)))


def check(model: nn.Module, args: tuple[Any, ...], **options: Any) -> ShrinkResult:
    """Remove blocks, and compare with the model masked by hand; every masked block returns what it was given."""
    kwargs = options.pop("kwargs", {})
    model = liven(model).double().eval()
    dense = copy.deepcopy(model)
    args = tuple(item.double() if item.is_floating_point() else item for item in args)
    result = dw.prune(model, args, example_kwargs=kwargs, axes=["block"], **options)
    assert result.model is model
    assert result.plan.blocks
    masked = masked_by_hand(dense, result)
    untouched = []
    for removal in result.plan.blocks:
        module = masked.get_submodule(removal.path)
        key = removal.source
        module.register_forward_hook(
            lambda _module, own_args, own_kwargs, output, key=key: untouched.append(
                torch.equal(first_tensor(output), own_args[key] if isinstance(key, int) else own_kwargs[key])
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        expected = first_tensor(list(dict(masked(*args, **kwargs)).values()) if kwargs else masked(*args))
        actual = first_tensor(list(dict(model(*args, **kwargs)).values()) if kwargs else model(*args))
        before = first_tensor(list(dict(dense(*args, **kwargs)).values()) if kwargs else dense(*args))
    assert len(untouched) == len(result.plan.blocks)
    assert all(untouched)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(actual, before, rtol=1e-3)
    gone = [
        name
        for name, _ in dense.named_parameters()
        if name.startswith(tuple(f"{p}." for p in removed(result)))
    ]
    assert result.parameters_after == result.parameters_before - sum(
        dense.get_parameter(name).numel() for name in gone
    )
    return result


def image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def test_residual_network_loses_blocks_of_every_stage() -> None:
    model = SmallResNet()
    result = check(model, (image(),), ratio=0.5)
    assert len(model.stage1) == 2
    assert len(model.stage2) == 2
    assert all(path.startswith(("stage1.", "stage2.")) for path in removed(result))
    assert "stage2.0" not in removed(result)  # it changes the width
    reasons = {entry["parameters"][0]: entry["reason"] for entry in result.frozen if entry["kind"] == "block"}
    assert "another shape" in reasons["stage2.0"]


def test_activation_after_the_sum_must_keep_the_input() -> None:
    for after in (F.gelu, torch.tanh, F.silu):
        result = dw.prune(SmallResNet(after), image(), ratio=0.5, axes=["block"])
        assert not result.plan.blocks
        assert any("activation" in entry["reason"] for entry in result.frozen if entry["kind"] == "block")
        assert any("nothing was cut" in note for note in result.notes)


def test_relu_after_the_sum_of_what_may_be_negative_stays() -> None:
    class Open(nn.Module):
        """The first block gets the result of a convolution, which may be negative."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.blocks = nn.Sequential(Basic(8, 8), Basic(8, 8), Basic(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.stem(x)).mean((1, 2, 3))

    result = check(Open(), (image(),), ratio=0.99)
    assert sorted(removed(result)) == ["blocks.1", "blocks.2"]


def test_transformer_layers_leave_their_list() -> None:
    model = Transformer()
    result = check(model, (torch.randn(2, 3, 6),), ratio=0.4)
    assert len(model.layers) == model.num_layers == 3
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2]
    cache: dict[int, Any] = {}
    model(torch.randn(2, 3, 6).double(), cache)
    assert sorted(cache) == [0, 1, 2]
    assert all(removal.deleted for removal in result.plan.blocks)


@pytest.mark.parametrize("by_place", ["around", "inside"])
def test_stand_in_where_the_code_counts_places(by_place: str) -> None:
    model = Transformer(by_place=by_place)
    result = check(model, (torch.randn(2, 3, 6),), ratio=0.4)
    assert [type(layer) for layer in model.layers].count(PassThrough) == 2
    assert [layer.layer_idx for layer in model.layers if isinstance(layer, Layer)] == [
        place for place in range(5) if f"layers.{place}" not in removed(result)
    ]
    assert any("pass-through" in note for note in result.notes)


def test_one_block_of_each_stage_stays_unless_the_ratio_is_one() -> None:
    assert len(removed(check(Transformer(), (torch.randn(2, 3, 6),), ratio=0.95))) == 4
    model = Transformer()
    assert len(removed(check(model, (torch.randn(2, 3, 6),), ratio=1))) == 5
    assert len(model.layers) == 0


def test_ratios_and_ignored_names() -> None:
    x = image()
    result = check(SmallResNet(), (x,), ratio=0.0, ratios={"stage2": 0.5})
    assert len(removed(result)) == 2
    assert all(path.startswith("stage2.") for path in removed(result))
    result = check(SmallResNet(), (x,), ratio=0.5, ignore=["stage2"])
    assert all(path.startswith("stage1.") for path in removed(result))
    result = check(Transformer(3), (torch.randn(2, 3, 6),), ratio=0.7, ignore=["layers.1.feed"])
    assert sorted(removed(result)) == ["layers.0", "layers.2"]


def test_least_important_blocks_go() -> None:
    model = Transformer()
    with torch.no_grad():
        for place in (1, 3):
            for parameter in model.layers[place].parameters():
                parameter.mul_(0.1)
    own = copy.deepcopy(model)
    assert removed(dw.prune(model, torch.randn(2, 3, 6), ratio=0.4, axes=["block"])) == [
        "layers.1",
        "layers.3",
    ]

    def reverse(weight: torch.Tensor, dim: int) -> torch.Tensor:
        return -weight.abs().mean([d for d in range(weight.dim()) if d != dim]) + 10

    result = dw.prune(own, torch.randn(2, 3, 6), ratio=0.4, axes=["block"], importance=reverse)
    assert not {"layers.1", "layers.3"} & set(removed(result))


def test_global_ranking_takes_blocks_wherever_they_are_small() -> None:
    model = SmallResNet()
    with torch.no_grad():
        for parameter in model.stage2[1:].parameters():
            parameter.mul_(0.9)  # the same for all blocks of a stage: ranked inside it
        for block in (model.stage2[1], model.stage2[3], model.stage1[0]):
            block.norm2.weight.mul_(0.01)
    result = dw.prune(model, image(), ratio=3 / 7, axes=["block"], scope="global")
    assert sorted(removed(result)) == ["stage1.0", "stage2.1", "stage2.3"]


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_target(cost: str) -> None:
    x = torch.randn(2, 3, 6)
    model = Transformer(8)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = dw.prune(model, x, target={cost: 0.5}, axes=["block"])
    assert len(removed(result)) == 4
    model = Transformer(8)
    result = dw.prune(model, x, target={"params": 0.4}, axes=["block", "feed_forward", "channels", "heads"])
    assert result.plan.blocks
    assert any(entry["kind"] != "block" for entry in result.plan.cuts)
    assert abs(result.parameters_after / parameters - 0.4) < 0.02


def test_blocks_and_channels_in_one_call() -> None:
    model, x = liven(SmallResNet()).eval(), image()
    result = dw.prune(model, x, ratio=0.5, axes=["block", "channels"])
    kinds = {entry["kind"] for entry in result.plan.cuts}
    assert kinds == {"block", "channels"}
    assert result.verification is not None
    assert result.verification.max_difference < 1e-9
    assert model.stem.out_channels == 4
    gone = tuple(f"{path}." for path in removed(result))
    assert not [entry for entry in result.plan.cuts if all(p.startswith(gone) for p in entry["parameters"])]


def test_optimizer_goes_on_without_the_removed_parameters() -> None:
    model, x = Transformer(), torch.randn(4, 3, 6)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.layers.parameters()), "lr": 1e-2},
            {"params": [*model.embed.parameters(), *model.head.parameters()]},
        ]
    )

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    moments = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    dw.prune(model, x, ratio=0.6, axes=["block"], optimizer=optimizer)
    left = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in optimizer.state} == left
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["exp_avg"], moments[id(parameter)])
    before = copy.deepcopy(model.state_dict())
    step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("by_place", ["", "inside"], ids=["taken_out", "passed_through"])
def test_saved_and_loaded(tmp_path: Path, by_place: str) -> None:
    model, x = liven(Transformer(by_place=by_place)).eval(), torch.randn(2, 3, 6)
    result = dw.prune(model, x, ratio=0.4, axes=["block", "heads", "feed_forward"])
    dw.save(result, tmp_path / "small")
    loaded = dw.load(tmp_path / "small", lambda: Transformer(by_place=by_place))
    assert torch.equal(loaded(x), model(x))
    assert len(loaded.layers) == len(model.layers)
    assert loaded.num_layers == model.num_layers


def test_nothing_is_touched_when_the_proof_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = liven(Transformer()).eval(), torch.randn(2, 3, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    answer, layers, parameters = model(x), list(model.layers), list(model.parameters())
    state = copy.deepcopy(model.state_dict())

    def forget(_model: nn.Module, _removals: Any) -> None:
        """A mask that masks nothing: the small model must be found unequal to it."""

    from dwindle.realize import shrink as shrinking

    monkeypatch.setattr(shrinking, "zero_branches", forget)
    with pytest.raises(RealizeError, match="not equal"):
        dw.prune(model, x, ratio=0.4, axes=["block"], optimizer=optimizer)
    monkeypatch.undo()
    monkeypatch.setattr(depth_proof, "zero_branches", forget)
    with pytest.raises(RealizeError, match="training mode"):
        dw.prune(model, x, ratio=0.4, axes=["block"], optimizer=optimizer)
    assert torch.equal(model(x), answer)
    assert all(old is new for old, new in zip(layers, model.layers, strict=True))
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(held, state[name]) for name, held in model.state_dict().items())
    assert [p for group in optimizer.param_groups for p in group["params"]] == parameters
    assert model.num_layers == 5


def test_training_mode_is_judged_for_itself() -> None:
    class Trained(Layer):
        """Only in training, the result is scaled: there the block is not its input plus a branch."""

        def forward(
            self, x: torch.Tensor, cache: dict[int, Any] | None = None, strength: float = 1.0
        ) -> tuple[torch.Tensor, None]:
            result = super().forward(x, cache, strength)[0]
            return (result * 1.1 if self.training else result), None

    model = Transformer()
    model.layers = nn.ModuleList(Trained(place) for place in range(5))
    result = dw.prune(model, torch.randn(2, 3, 6), ratio=0.4, axes=["block"])
    assert not result.plan.blocks
    assert any("training mode" in entry["reason"] for entry in result.frozen if entry["kind"] == "block")


def test_inner_results_that_are_used_outside_keep_a_block() -> None:
    class Shared(nn.Module):
        """The first layer works out a bias that all the others use."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.blocks = nn.ModuleList(WithBias(place == 0) for place in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = None
            for block in self.blocks:
                x, bias = block(x, bias)
            return x

    class WithBias(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.make = nn.Linear(8, 8) if first else None
            self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            if self.make is not None:
                bias = self.make(x).tanh()
            return x + self.outer(F.relu(self.inner(x + bias))), bias

    result = check(Shared(), (torch.randn(2, 8),), ratio=0.99)
    assert sorted(removed(result)) == ["blocks.1", "blocks.2"]
    reasons = {entry["parameters"][0]: entry["reason"] for entry in result.frozen if entry["kind"] == "block"}
    assert "used outside" in reasons["blocks.0"]


class Odd(nn.Module):
    """Modules of one list that add something without being residual blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Strange(kind) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Strange(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.norm = kind, nn.Linear(8, 8), nn.LayerNorm(8)
        self.shift = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "post norm":
            return self.norm(x + self.linear(x))
        if self.kind == "normed input":
            x = self.norm(x)
            return x + self.linear(x)
        if self.kind == "flipped":
            return x.flip(-1) + self.linear(x)
        if self.kind == "scaled":
            return x * 0.5 + self.linear(x)
        if self.kind == "subtracted":
            return self.linear(x) - x
        if self.kind == "sigmoid":
            return x + self.linear(x).sigmoid()
        if self.kind == "through a view":
            y = x + self.linear(x)
            y[:, :2].mul_(2.0)
            return y
        if self.kind == "doubled":
            return x + x + self.linear(x)
        if self.kind == "two casts":
            return x.half().to(x.dtype) + self.linear(x)
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    "kind",
    [
        "post norm",
        "normed input",
        "flipped",
        "scaled",
        "subtracted",
        "sigmoid",
        "through a view",
        "doubled",
        "two casts",
    ],
)
def test_what_is_not_residual_stays(kind: str) -> None:
    model = Odd(kind)
    assert not [block for block in analyse(model, (torch.randn(2, 8),)).blocks if block.reason is None]
    result = dw.prune(model, torch.randn(2, 8), ratio=0.5, axes=["block"])
    assert len(model.blocks) == 3
    assert result.parameters_after == result.parameters_before


class Moved(nn.Module):
    """Residual all the same: reshapes and permutes there and back, in place, subtracted, gated, weight norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.gate = kind, nn.Linear(8, 8), nn.Linear(8, 8)
        if kind == "weight norm":
            self.linear = nn.utils.parametrizations.weight_norm(self.linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "reshaped":
            flat = x.reshape(-1, 8)
            return (flat + self.linear(flat)).view(x.shape)
        if self.kind == "permuted":
            turned = x.permute(2, 0, 1)
            return (turned + self.linear(x).permute(2, 0, 1)).permute(1, 2, 0)
        if self.kind == "in place":
            x += self.linear(x)
            return x
        if self.kind == "subtracted":
            return x - self.linear(x)
        if self.kind == "gated":
            return self.linear(x) * torch.sigmoid(self.gate(x)) + x
        if self.kind == "summed":
            return torch.stack([self.linear(x), self.gate(x)]).sum(0) + x
        return torch.add(x, self.linear(x), alpha=0.5)


@pytest.mark.parametrize(
    "kind", ["reshaped", "permuted", "in place", "subtracted", "gated", "summed", "half", "weight norm"]
)
def test_what_is_residual_goes(kind: str) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(4, 8), nn.Sequential(*[Moved(kind) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.stem(x))

    model = Chain()
    assert len(removed(check(model, (torch.randn(2, 3, 4),), ratio=0.5))) == 2
    assert len(model.blocks) == 2


def test_nested_candidates_go_as_whole_blocks() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(self.norm(x))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Half(), Half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(*[nn.Sequential(*[Whole() for _ in range(3)]) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stages(x)

    analysis = analyse(Stages(), (torch.randn(2, 8),))
    paths = [block.path for block in analysis.blocks if block.reason is None]
    assert paths == [f"stages.{stage}.{place}" for stage in range(2) for place in range(3)]


def test_inspect_lists_blocks() -> None:
    analysis = analyse(SmallResNet(), (image(),))
    entries = {entry["path"]: entry for entry in to_json(analysis)["blocks"]}
    assert entries["stage1.0"]["removable"]
    assert not entries["stage2.0"]["removable"]
    text = describe(analysis)
    assert "stage1.0 (of 3): may go" in text
    assert "stage2.0 (of 4): stays: its output has another shape" in text


def test_default_axes_remove_no_block() -> None:
    result = dw.prune(SmallResNet(), image(), ratio=0.5)
    assert not result.plan.blocks


def test_trains_after_removal() -> None:
    model, x = SmallResNet(), image()
    dw.prune(model, x, ratio=0.5, axes=["block", "channels"])
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_randomness_is_still_in_the_training_proof() -> None:
    x = torch.randn(64, 64)
    with torch.inference_mode(), StillRandomness():
        assert torch.equal(F.dropout(x, 0.5, True), x)
        assert torch.equal(torch.rand(3), torch.full((3,), 0.5))
        assert torch.equal(torch.bernoulli(torch.full((3,), 0.2)), torch.ones(3))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 4}),
        ("convnext_atto", 32, {}),
        ("mixer_s32_224", 32, {"img_size": 32}),
    ],
)
def test_timm(name: str, size: int, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    check(model, (image(size),), ratio=0.5)


def test_torchvision_resnet18() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None)
    result = check(model, (image(32),), ratio=0.5)
    assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert all(removal.deleted for removal in result.plan.blocks)


def hugging_face(name: str) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 60, (2, 6))
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), ids
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=32)
        return transformers.GPT2LMHeadModel(config), ids
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        return transformers.BertForSequenceClassification(config), ids
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
    )
    return transformers.ViTForImageClassification(config), image()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_language_model_generates_with_its_cache_after_removal(name: str) -> None:
    model, ids = hugging_face(name)
    result = check(model, (), kwargs={"input_ids": ids}, ratio=0.5)
    assert all(removal.deleted for removal in result.plan.blocks)
    assert model.config.num_hidden_layers == 2
    model.eval()
    with torch.no_grad():
        fast = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
        slow = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
        assert torch.equal(fast, slow)
        cache = model(ids, use_cache=True).past_key_values
    assert len(cache.layers) == 2
    assert all(layer.keys is not None for layer in cache.layers)


def test_hugging_face_model_is_saved_without_dwindle(tmp_path: Path) -> None:
    model, ids = hugging_face("llama")
    dw.prune(model, (), example_kwargs={"input_ids": ids}, ratio=0.5, axes=["block"])
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_vision_transformer() -> None:
    model, pixels = hugging_face("vit")
    check(model, (), kwargs={"pixel_values": pixels.double()}, ratio=0.5)


def test_post_norm_transformer_says_why_it_stays() -> None:
    model, ids = hugging_face("bert")
    result = dw.prune(model, (), example_kwargs={"input_ids": ids}, ratio=0.5, axes=["block"])
    reasons = [entry["reason"] for entry in result.frozen if entry["kind"] == "block"]
    assert len(reasons) == 2
    assert all("norm follows the sum" in reason for reason in reasons)


def test_only_numbers_that_count_the_blocks_follow() -> None:
    class Counting(Transformer):
        """Other numbers speak of layers as well, and happen to be equal."""

        def __init__(self) -> None:
            super().__init__()
            self.attend_every_n_layers, self.width, self.depth = 5, 5, 5

    model = Counting()
    check(model, (torch.randn(2, 3, 6),), ratio=0.4)
    assert (model.num_layers, model.depth) == (3, 3)
    assert (model.attend_every_n_layers, model.width) == (5, 5)
