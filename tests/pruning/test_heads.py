"""Attention heads: six criteria against their formulas, local and global, fused and grouped, never an empty layer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle as dw
from dwindle.config import Target
from dwindle.config.errors import ConfigError
from dwindle.pruning import TransformerHeadPruner
from dwindle.pruning.heads import by_head, head_norms
from dwindle.training import compress
from pruning.models import Attention, lively

HEADS, WIDTH, SIZE = 4, 6, 24
Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Two attention blocks before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.classifier = nn.Linear(SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.second(self.first(x)).mean(1))


class Fused(nn.Module):
    """The same attention with query, key and value in one weight."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.norm = copy.deepcopy(source.norm1)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), copy.deepcopy(source.out)
        self.heads = HEADS
        parts = (source.query, source.key, source.value)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, 3, self.heads, -1)
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(mixed.flatten(2))


def model() -> Model:
    torch.manual_seed(1)
    made = Model()
    lively(made)
    with torch.no_grad():  # heads that differ clearly
        for block in (made.first, made.second):
            for part in (block.query, block.key, block.value, block.out):
                scale = torch.rand(HEADS).repeat_interleave(WIDTH) + 0.2
                part.weight.mul_(scale[:, None] if part is not block.out else scale[None])
    return made.double().eval()


def batches(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(3, 5, SIZE, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (3,), generator=generator),
        )
        for _ in range(count)
    ]


INPUTS = (batches(1)[0][0],)


def parts(block: Attention) -> list[np.ndarray]:
    """Query, key and value as [heads, width, inputs]."""
    return [
        own.weight.detach().numpy().reshape(HEADS, WIDTH, SIZE)
        for own in (block.query, block.key, block.value)
    ]


def gone(masked: nn.Module, block: str) -> list[int]:
    """Heads whose query, key and value are all masked; no head is masked in part."""
    kept = []
    for name in ("query", "key", "value"):
        weight = masked.get_submodule(block).get_submodule(name).weight.reshape(HEADS, -1)
        share = (weight != 0).double().mean(1)
        assert set(share.tolist()) <= {0.0, 1.0}
        kept.append(share.tolist())
    assert kept[0] == kept[1] == kept[2]
    return [head for head in range(HEADS) if kept[0][head] == 0]


def lowest(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())


def weight_scores(block: Attention, order: int) -> np.ndarray:
    return np.mean(
        [[np.linalg.norm(own[h].ravel(), order) for h in range(HEADS)] for own in parts(block)], axis=0
    )


def head_outputs(made: Model, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(made, name).out.register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in ("first", "second")
    ]
    made(x)
    for handle in handles:
        handle.remove()
    return seen


def activation_scores(made: Model, data: list[Batch], block: str, order: int) -> np.ndarray:
    samples = [sample for x, _ in data for sample in head_outputs(made, x)[block].numpy()]
    return np.mean(
        [
            [np.linalg.norm(s.reshape(5, HEADS, WIDTH)[:, h].ravel(), order) for h in range(HEADS)]
            for s in samples
        ],
        axis=0,
    )


def taylor_scores(made: Model, data: list[Batch], block: str) -> np.ndarray:
    """Michel et al., equation 2, by finite differences: a factor on what one head gives, for one sample."""
    out, step = getattr(made, block).out, 1e-5
    scores = np.zeros(HEADS)
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    for head in range(HEADS):
        for x, y in samples:
            losses = []
            for factor in (1 + step, 1 - step):
                scale = torch.ones(SIZE, dtype=torch.float64)
                scale[head * WIDTH : (head + 1) * WIDTH] = factor
                handle = out.register_forward_pre_hook(lambda m, args, scale=scale: (args[0] * scale,))
                losses.append(float(functional.cross_entropy(made(x), y).detach()))
                handle.remove()
            scores[head] += abs(losses[0] - losses[1]) / (2 * step) / len(samples)
    return scores


def found_scores(pruner: TransformerHeadPruner, block: str) -> np.ndarray:
    """The importance of each head as the ranking gets it: the mean over projections of the sums over rows."""
    scores = []
    for name in ("query", "key", "value"):
        target = Target(f"{block}.{name}", "weight")
        weight = pruner.collect()[target]
        metric = pruner.metric(target, weight, pruner.plan.goals[target].granularity)
        scores.append(metric.reshape(HEADS, WIDTH).sum(1).numpy())
    return np.mean(scores, axis=0)


@pytest.mark.parametrize("criterion", ["l1_weight", "l2_weight", "l1_activation", "l2_activation", "taylor"])
def test_scores_and_local_masks(criterion: Any) -> None:
    made, data = model(), batches()
    expected = {}
    for block in ("first", "second"):
        if criterion == "taylor":
            expected[block] = taylor_scores(made, data, block)
        elif criterion.endswith("weight"):
            expected[block] = weight_scores(getattr(made, block), int(criterion[1]))
        else:
            expected[block] = activation_scores(made, data, block, int(criterion[1]))
    options = {} if criterion.endswith("weight") else {"data": data}
    pruner = TransformerHeadPruner(made, 0.5, INPUTS, criterion=criterion, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.compress()
    for block, scores in expected.items():
        if criterion.endswith("weight"):
            fresh = TransformerHeadPruner(model(), 0.5, INPUTS, criterion=criterion)
            fresh.prepare()
            np.testing.assert_allclose(found_scores(fresh, block), scores, rtol=1e-6)
        else:
            np.testing.assert_allclose(found_scores(pruner, block), scores, rtol=1e-6)
        assert gone(made, block) == lowest(scores, 2)
    assert {row.target for row in pruner.report().rows if row.follows is None} == {
        f"{block}.{name}.weight" for block in ("first", "second") for name in ("query", "key", "value")
    }
    masked = made(*INPUTS)
    result = dw.realize(made, example_inputs=INPUTS)
    assert result.verification is not None
    assert result.verification.proven
    assert (made.first.heads, made.first.query.out_features, made.first.up.out_features) == (2, 12, 48)
    torch.testing.assert_close(made(*INPUTS), masked)


def test_movement_is_what_the_steps_did() -> None:
    """- sum over steps of g w, with the weights of each step (Sanh et al., equation 5)."""
    made, data = model(), batches(3)
    twin = model()
    expected = {block: np.zeros(HEADS) for block in ("first", "second")}
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x, y in data:
        functional.cross_entropy(twin(x), y).backward()
        for block, scores in expected.items():
            for name in ("query", "key", "value"):
                weight = twin.get_submodule(f"{block}.{name}").weight
                scores -= (weight.grad * weight).detach().reshape(HEADS, -1).sum(1).numpy() / 3 / len(data)
        optimizer.step()
        optimizer.zero_grad()
    pruner = TransformerHeadPruner(made, 0.25, INPUTS, criterion="movement", training_steps=3)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made.train()
    with compress(made, [pruner]) as run:
        for x, y in data:
            functional.cross_entropy(made(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        for block, scores in expected.items():
            np.testing.assert_allclose(found_scores(pruner, block), scores, rtol=1e-8)
            assert gone(made, block) == lowest(scores, 1)


def test_all_heads_in_one_ranking_and_none_is_left_without() -> None:
    made = model()
    with torch.no_grad():
        for part in (made.first.query, made.first.key, made.first.value):
            part.weight.mul_(0.01)
    scores = weight_scores(made.first, 2)
    kept = int(np.argmax(scores))
    pruner = TransformerHeadPruner(copy.deepcopy(made), 0.5, INPUTS, criterion="l2_weight", scope="global")
    pruner.compress()
    assert gone(pruner.model, "first") == [head for head in range(HEADS) if head != kept]
    assert gone(pruner.model, "second") == lowest(weight_scores(made.second, 2), 1)
    pruner = TransformerHeadPruner(
        copy.deepcopy(made), 0.5, INPUTS, criterion="l2_weight", scope="global", normalize=True
    )
    pruner.compress()
    both = np.concatenate([own / np.linalg.norm(own) for own in (scores, weight_scores(made.second, 2))])
    ranked = set(np.argsort(both)[:4].tolist())
    assert gone(pruner.model, "first") == sorted(head for head in ranked if head < HEADS)
    pruner = TransformerHeadPruner(made, 0.5, INPUTS, criterion="l2_weight", scope="global", allow_empty=True)
    pruner.compress()
    assert gone(made, "first") == list(range(HEADS))
    assert gone(made, "second") == []
    masked = made(*INPUTS)
    result = dw.realize(made, example_inputs=INPUTS)
    assert result.verification is not None
    assert result.verification.proven
    torch.testing.assert_close(result.model(*INPUTS), masked)


@pytest.mark.parametrize("ratio", [0.99, 1.0])
def test_one_head_stays(ratio: float) -> None:
    made = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TransformerHeadPruner(made, ratio, INPUTS, criterion="l1_weight").compress()
    for block in ("first", "second"):
        expected = lowest(weight_scores(getattr(model(), block), 1), 3)
        assert gone(made, block) == expected


@pytest.mark.parametrize("criterion", ["l1_weight", "l2_weight"])
def test_a_fused_projection_scores_as_three(criterion: Any) -> None:
    source = model()
    block = source.first
    fused = Fused(block).double().eval()
    pruner = TransformerHeadPruner(
        fused, [{"op_names": ["qkv"], "sparse_ratio": 0.5}], INPUTS, criterion=criterion
    )
    pruner.prepare()
    target = Target("qkv", "weight")
    metric = pruner.metric(target, fused.qkv.weight.detach(), pruner.plan.goals[target].granularity)
    scores = metric.reshape(3, HEADS, WIDTH).sum((0, 2)).numpy()
    np.testing.assert_allclose(scores, weight_scores(block, int(criterion[1])), rtol=1e-9)
    TransformerHeadPruner(fused, 0.5, INPUTS, criterion=criterion).compress()
    dw.realize(fused, example_inputs=INPUTS)
    assert (fused.heads, fused.qkv.out_features) == (2, 36)


def test_multihead_attention_by_the_weight_of_its_output() -> None:
    """Its output projection is never called; the gate's gradient stands in that projection's weight too."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
            self.classifier = nn.Linear(SIZE, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    torch.manual_seed(4)
    made, data = Torch().double().eval(), batches()
    expected = torch.zeros(HEADS, dtype=torch.float64)
    weight = made.attention.out_proj.weight
    for x, y in data:
        (gradient,) = torch.autograd.grad(functional.cross_entropy(made(x), y), [weight])
        expected += (gradient * weight).detach().sum(0).reshape(HEADS, WIDTH).sum(1).abs() / len(data)
    pruner = TransformerHeadPruner(made, 0.5, INPUTS, criterion="taylor", data=data)
    pruner.prepare()
    (key,) = list(pruner.statistics)
    torch.testing.assert_close(pruner.mean(key), expected)
    with pytest.raises(ConfigError, match="cannot be seen"):
        TransformerHeadPruner(made, 0.5, INPUTS, criterion="l2_activation", data=data).compress()


def llama() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 40, (2, 6))


def bert() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config).eval(), torch.randint(0, 40, (2, 6))


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **options).eval(), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("build", [llama, bert, vit])
@pytest.mark.parametrize("criterion", ["l2_weight", "taylor"])
def test_real_attention(build: Any, criterion: Any) -> None:
    """Grouped queries, separate and fused projections: half of the heads of every layer go, and are cut."""
    torch.manual_seed(5)
    made, x = build()
    labels = x if build is llama else torch.tensor([0, 1])

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), target.flatten())

    options = {} if criterion == "l2_weight" else {"data": [(x, labels)] * 2, "loss": loss}
    pruner = TransformerHeadPruner(made, 0.5, (x,), criterion=criterion, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.compress()
    rows = [row for row in pruner.report().rows if row.target.endswith("weight")]
    assert len(rows) == (2 if build is vit else 6)
    assert {row.achieved for row in rows} == {0.5}
    result = dw.realize(made, example_inputs=(x,))
    assert result.verification is not None
    assert result.verification.proven


def test_the_norms_of_a_head() -> None:
    rows = torch.tensor([[3.0], [4.0], [1.0], [6.0], [8.0], [2.0], [9.0]])
    index = torch.tensor([0, 0, 1, 0, 0, 1, -1])
    assert head_norms(rows, index, 2, 2).tolist() == [7.5, 1.5]  # (5 + 10) / 2, (1 + 2) / 2
    assert head_norms(rows, index, 2, 1).tolist() == [10.5, 1.5]
    assert by_head(rows.T, index, 2).tolist() == [[21.0, 3.0]]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (0.5, {"criterion": "l1"}, "criterion"),
        (0.5, {"scope": "lokal"}, "did you mean 'local'"),
        (1.5, {}, "not a share"),
        (0.5, {"criterion": "movement", "data": batches()}, "training run only"),
        (0.5, {"data": batches()}, "weights only"),
        (0.5, {"criterion": "taylor"}, "needs data="),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5, "axes": ["feed_forward"]}], {}, "prunes heads"),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "element"}], {}, "output channels"),
        ([{"op_names": ["first.up"], "sparse_ratio": 0.5}], {}, "makes heads"),
    ],
)
def test_mistakes(config: Any, options: dict[str, Any], words: str) -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ConfigError, match=words):
        TransformerHeadPruner(made, config, INPUTS, **options).compress()
    assert list(made.state_dict()) == list(before)


def test_inputs_are_needed() -> None:
    with pytest.raises(ConfigError, match="example_inputs"):
        TransformerHeadPruner(model(), 0.5)
