"""Any architecture, no per-model code: half of every axis goes, the rest is proven, runs and trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dwindle as dw

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def torchvision(name: str, size: int = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision import models

        return models.get_model(name, weights=None, **options), (torch.randn(2, 3, size, size),), {}

    return make


def small_swin() -> Made:
    """Windows, shifts, relative positions and patch merging as in swin_t, at a fraction of its size."""
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 32, [2, 2], [4, 8], window_size=[4, 4], num_classes=10)
    return model, (torch.randn(2, 3, 32, 32),), {}


def segmentation(name: str, size: int = 64) -> Callable[[], Made]:
    return torchvision(name, size, weights_backbone=None)


def timm(name: str, size: int = 224, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm as library

        return library.create_model(name, pretrained=False, **options), (torch.randn(2, 3, size, size),), {}

    return make


def tokens(length: int = 7, vocabulary: int = 100) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, length))


def bert() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config), (tokens(),), {}


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config), (), {"input_ids": tokens()}


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config), (), {"input_ids": tokens()}


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), (), {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    return ViTForImageClassification(config), (torch.randn(2, 3, 32, 32),), {}


MODELS: dict[str, Callable[[], Made]] = {
    "resnet18": torchvision("resnet18", 32),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small", 32),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5", 32),
    "hf_bert": bert,
    "hf_gpt2": gpt2,
    "hf_llama": llama,
    "hf_t5": t5,
    "hf_vit": vit,
    "timm_vit_tiny": timm("vit_tiny_patch16_224", 32, img_size=32),
    "small_swin": small_swin,
    "swin_t": torchvision("swin_t", 64),
    "ghostnet_100": timm("ghostnet_100", 64),
    "vit_b_16": torchvision("vit_b_16", 32, image_size=32),
    "densenet121": torchvision("densenet121", 32),
    "efficientnet_b0": torchvision("efficientnet_b0", 32),
    "convnext_tiny": torchvision("convnext_tiny", 64),
    "deeplabv3_mobilenet_v3_large": segmentation("deeplabv3_mobilenet_v3_large", 64),
    "mixer_s32": timm("mixer_s32_224"),
    "coat_lite_tiny": timm("coat_lite_tiny"),
}


def outputs(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    items = (
        result.values() if hasattr(result, "values") else result if isinstance(result, list | tuple) else []
    )
    return [tensor for item in items for tensor in outputs(item)]


def batch_of(tree: Any, size: int) -> Any:
    """The same inputs at another batch size."""
    if isinstance(tree, dict):
        return {key: batch_of(item, size) for key, item in tree.items()}
    if isinstance(tree, tuple):
        return tuple(batch_of(item, size) for item in tree)
    return torch.cat([tree] * size)[:size]


def check(make: Callable[[], Made]) -> None:
    model, args, kwargs = make()
    mode = model.training
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # heads that start at zero give no gradient to the rest
    shape = outputs(copy.deepcopy(model)(*args, **kwargs))[0].shape
    before = sum(parameter.numel() for parameter in model.parameters())
    result = dw.prune(model, args, ratio=0.5, example_kwargs=kwargs)
    assert result.model is model
    assert model.training is mode
    assert not result.plan.rewritten
    proof = result.verification
    assert proof.proven
    assert proof.dtype == "float64"
    assert proof.max_difference <= 1e-9
    assert len(set(proof.batch_sizes)) == 2
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (result.parameters_before, result.parameters_after) == (before, after)
    assert 0.2 <= after / before <= 0.5
    # hidden states beside the logits may be narrower; the logits (the first output) may not
    assert outputs(model.train()(*args, **kwargs))[0].shape == shape
    # runs at another batch size, and trains
    model.eval()
    with torch.no_grad():
        assert all(t.isfinite().all() for t in outputs(model(*batch_of(args, 3), **batch_of(kwargs, 3))))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    old = [parameter.detach().clone() for parameter in model.parameters()]
    loss = sum((tensor - 1).square().mean() for tensor in outputs(model(*args, **kwargs)))
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    optimizer.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))
    assert moved >= 0.5 * (len(old) - len(missing)) > 0
    assert len(missing) < 0.2 * len(old)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_axis(name: str) -> None:
    check(MODELS[name])


def test_heads_of_grouped_queries_go_in_groups() -> None:
    model, args, kwargs = llama()
    dw.prune(model, args, ratio=0.5, example_kwargs=kwargs)
    attention = model.model.layers[0].self_attn
    # 8 query heads share 4 key heads: 2 key heads of width 8 stay, with both queries of each
    assert attention.k_proj.weight.shape[0] == 2 * 8
    assert attention.q_proj.weight.shape[0] == 4 * 8
    assert attention.o_proj.weight.shape[1] == 4 * 8


@pytest.mark.parametrize("masked", ["outputs", "inputs"])
def test_masks_of_transposed_weights(masked: str) -> None:
    """GPT-2's Conv1D holds (in, out): masked columns, or rows that nothing reads, cut the feed-forward width."""
    model, args, kwargs = gpt2()
    layer = "transformer.h.0.mlp"
    keep = torch.ones(256)
    keep[::2] = 0
    if masked == "outputs":
        masks = {f"{layer}.c_fc": {"weight": keep.expand(64, 256).clone(), "bias": keep}}
    else:
        masks = {f"{layer}.c_proj": {"weight": keep[:, None].expand(256, 64).clone()}}
    reference = copy.deepcopy(model).double().eval()
    for path, targets in masks.items():
        for name, mask in targets.items():
            getattr(reference.get_submodule(path), name).data.mul_(mask)
    dw.realize(model, args, example_kwargs=kwargs, masks=masks)
    assert list(model.get_submodule(f"{layer}.c_fc").weight.shape) == [64, 128]
    assert list(model.get_submodule(f"{layer}.c_proj").weight.shape) == [128, 64]
    ids = torch.randint(0, 100, (3, 9))
    expected, actual = (
        own(input_ids=ids).logits for own in (reference, copy.deepcopy(model).double().eval())
    )
    assert (expected - actual).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["hf_bert", "hf_llama", "hf_t5", "small_swin"])
def test_any_masks_are_realized_exactly(name: str) -> None:
    """Random rows and columns of every weight: what cannot be cut stays, and nothing changes."""
    model, args, kwargs = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    masks: dict[str, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = (torch.rand(module.out_features, generator=generator) < 0.6).float()
            masks[path] = {"weight": keep[:, None].expand(module.weight.shape).clone()}
            if module.bias is not None:
                masks[path]["bias"] = keep
    reference = copy.deepcopy(model).double().eval()
    for path, targets in masks.items():
        for parameter, mask in targets.items():
            getattr(reference.get_submodule(path), parameter).data.mul_(mask)
    result = dw.realize(model, args, example_kwargs=kwargs, masks=masks)
    assert result.parameters_after < 0.95 * result.parameters_before
    assert result.verification.reference == "the masked model itself"
    small = copy.deepcopy(result.model).double().eval()
    inputs = batch_of(args, 3), batch_of(kwargs, 3)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs[0]), inputs[1]
    torch.set_default_dtype(torch.float64)
    try:
        expected, actual = (outputs(own(*inputs[0], **inputs[1]))[0] for own in (reference, small))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (expected - actual).abs().max() <= 1e-6  # folded constants are stored in float32


def test_tied_embeddings_stay_tied() -> None:
    model, args, kwargs = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    dw.prune(model, args, ratio=0.5, example_kwargs=kwargs)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(model.lm_head.weight.shape) == [100, 32]


def test_auxiliary_heads_that_exist_only_in_training_stay_intact() -> None:
    """GoogLeNet's auxiliary classifiers run in training mode only; pruning must cut them with the trunk."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
            self.auxiliary = nn.Conv2d(16, 4, 1)
            self.head = nn.Conv2d(16, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.trunk(x)
            out = self.head(x).mean((2, 3))
            return (out, self.auxiliary(x).mean((2, 3))) if self.training else out

    model = Auxiliary()
    dw.prune(model, torch.randn(2, 3, 8, 8), ratio=0.5)
    assert list(model.auxiliary.weight.shape) == [4, 8, 1, 1]
    out, auxiliary = model.train()(torch.randn(2, 3, 8, 8))
    (out.sum() + auxiliary.sum()).backward()


def test_two_prunings_in_a_row() -> None:
    model, args, kwargs = bert()
    first = dw.prune(model, args, ratio=0.25, example_kwargs=kwargs)
    second = dw.prune(model, args, ratio=0.5, example_kwargs=kwargs)
    assert second.parameters_before == first.parameters_after
    assert second.parameters_after < 0.6 * first.parameters_after
